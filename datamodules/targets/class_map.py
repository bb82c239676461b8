"""Class maps: PNG files with one number per pixel, their decoding, their translation to classes, and their encoding."""

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.io import encode_png

from ssmpretrain.datamodules.decoding.decode import MAX_PIXELS, check_pixels, image_of
from ssmpretrain.datamodules.decoding.image_header import pixel_size
from ssmpretrain.datamodules.faults.bad_samples import BadSample
from ssmpretrain.datamodules.targets.batches import IGNORED

CLASS_MAP = "seg.png"  # member of a sample
MOST_CLASSES = IGNORED  # a class map has 8 bits, and 255 is ignored
NUMBERS = 1 << 16  # a PNG has up to 16 bits
_UNKNOWN = -1  # in a table: a number that is no class
_PNG = b"\x89PNG\r\n\x1a\n"
_PALETTE, _GREY = 3, 0  # colour types in the header of a PNG
_COLOURS = {2: "RGB", 4: "grey with transparency", 6: "RGB with transparency"}
# Pillow spreads grey values of fewer bits over 0 to 255.
_GREY_STEPS = {1: 1, 2: 85, 4: 17, 8: 1, 16: 1}
Table = NDArray[np.int16]


def decode_numbers(encoded: bytes, max_pixels: int = MAX_PIXELS) -> NDArray[Any]:
    """Decode a PNG with one number per pixel: grey of 1 to 16 bits, or the indices of a palette.

    Args:
        encoded: Content of the file.
        max_pixels: Largest number of pixels; a larger file is not decoded.

    Returns:
        The numbers as stored, (h, w), uint8 or uint16.

    Raises:
        BadSample: If the bytes are not one whole PNG, it is too large, or it has colours instead of numbers.
    """
    depth, colour = _header(encoded, max_pixels)
    if colour not in (_PALETTE, _GREY):
        kind = _COLOURS.get(colour, f"of colour type {colour}")
        raise BadSample("masks in colours", f"{kind}, where a pixel has one number: a grey PNG, or one with a palette")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `max_pixels` is the limit
            with Image.open(io.BytesIO(encoded)) as image:
                pixels = np.asarray(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadSample("undecodable masks", str(error).splitlines()[0][:80] if str(error) else "PNG") from None
    numbers = pixels.astype(np.uint16 if depth == 16 else np.uint8)
    return numbers // _GREY_STEPS[depth] if colour == _GREY and depth in (2, 4) else numbers


def decode_classes(encoded: bytes, table: Table, named: str, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode a PNG with one number per pixel, and translate the numbers to classes.

    Args:
        encoded: Content of the file.
        table: Class of each number, (65536,), as `class_table` returns it.
        named: Source of the classes, used in messages.
        max_pixels: As in `decode_numbers`.

    Returns:
        The class of each pixel, (h, w), uint8; 255 for a pixel to ignore.

    Raises:
        BadSample: As `decode_numbers`, and if a number is no class and is not ignored.
    """
    numbers = decode_numbers(encoded, max_pixels)
    classes = table[numbers]
    if classes.min() < 0:
        found, counts = np.unique(numbers[classes < 0], return_counts=True)
        few = ", ".join(map(str, found[:5].tolist())) + (", ..." if len(found) > 5 else "")
        raise BadSample("numbers without a class", f"{few} at {counts.sum():,} pixels; {named}")
    return torch.from_numpy(classes.astype(np.uint8))


def decode_class_map(raw: Mapping[str, Any], table: Table, named: str, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode the class map of a raw sample, and check that it has the size of the image.

    Args:
        raw: Fields of the sample, undecoded.
        table, named, max_pixels: As in `decode_classes`.

    Returns:
        The class of each pixel, (h, w), uint8; 255 for a pixel to ignore.

    Raises:
        BadSample: As `decode_classes`, and if the sample has no image or no class map, or their sizes differ.
    """
    return decode_classes(paired_mask(raw), table, named, max_pixels)


def paired_mask(raw: Mapping[str, Any]) -> bytes:
    """Return the encoded class map of a raw sample. Its header says the size of the image.

    Raises:
        BadSample: If the sample has no image or no class map, or their sizes differ.
    """
    image, mask = image_of(raw), raw.get(CLASS_MAP)
    if mask is None:
        fields = ", ".join(sorted(name for name in raw if not name.startswith("__")))
        raise BadSample("images without a mask", f"no {CLASS_MAP}; fields: {fields}")
    _check_png(mask)
    _check_same_size(image, mask)
    return mask  # type: ignore[no-any-return]


def class_table(num_classes: int, mapping: Mapping[int, int] | None = None, ignore: Sequence[int] = ()) -> Table:
    """Return the class of each number that a PNG can hold, (65536,), int16; -1 for a number that is no class.

    Args:
        num_classes: Number K of classes, 1 to 255.
        mapping: Class of each number, {number in the file: 0 to K - 1, or 255 to ignore it}. Other numbers are no
            classes. None means that the numbers are the classes.
        ignore: Numbers in the file to ignore; 255 is ignored unless `mapping` has it.
    """
    table = np.full(NUMBERS, _UNKNOWN, dtype=np.int16)
    table[IGNORED] = IGNORED
    for number, label in ({number: number for number in range(num_classes)} if mapping is None else mapping).items():
        table[number] = label
    table[list(ignore)] = IGNORED
    return table


def renumbered(table: Table, numbers: Sequence[int] | None) -> Table:
    """Return a table whose class c became `numbers[c]`, to match another list of classes; None changes nothing."""
    if numbers is None:
        return table
    others = np.asarray([*numbers, *[IGNORED] * (IGNORED + 1 - len(numbers)), _UNKNOWN], dtype=np.int16)
    return others[table]  # -1 takes the last


def encode_classes(classes: Tensor) -> bytes:
    """Encode a class map (h, w) uint8 as a grey PNG of 8 bits."""
    return encode_png(classes[None].contiguous(), compression_level=1).numpy().tobytes()  # type: ignore[no-any-return]


def _check_same_size(image: bytes, mask: bytes) -> None:
    """Raise if an image and its class map have different sizes, by their headers.

    Raises:
        BadSample: If the sizes differ, or a header cannot be read.
    """
    sizes = []
    for encoded, what in ((image, "images"), (mask, "masks")):
        try:
            sizes.append(pixel_size(encoded))
        except ValueError as error:
            raise BadSample(f"undecodable {what}", str(error)) from None
    if sizes[0] != sizes[1]:
        (w, h), (mask_w, mask_h) = sizes
        raise BadSample("masks of another size", f"image {w:,} x {h:,}, mask {mask_w:,} x {mask_h:,} pixels")


def _check_png(encoded: bytes) -> None:
    if not encoded.startswith(_PNG):
        try:
            pixel_size(encoded)
            kind = "a JPEG or WebP image, whose values change when it is compressed"
        except ValueError as error:
            kind = str(error).rpartition(" but ")[2]
        raise BadSample("masks that are no PNG", kind)


def _header(encoded: bytes, max_pixels: int) -> tuple[int, int]:
    """Return bits per channel and colour type of a PNG, and check its size."""
    _check_png(encoded)
    try:
        check_pixels(encoded, max_pixels)
    except BadSample as bad:
        raise BadSample(bad.cause.replace("images", "masks"), bad.detail) from None
    if len(encoded) < 33:
        raise BadSample("undecodable masks", "the header is cut off")
    return encoded[24], encoded[25]
