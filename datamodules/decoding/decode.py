"""Decoding of one sample: its image, within limits, and its label."""

from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from typing_extensions import NotRequired

from ssmpretrain.datamodules.decoding.image_header import num_scans, pixel_size
from ssmpretrain.datamodules.faults.bad_samples import BadSample
from ssmpretrain.datamodules.files.image_files import IMAGE_EXTENSIONS
from ssmpretrain.datamodules.labels.classes import Labels

MAX_PIXELS = 100_000_000  # 300 MB decoded; the largest images of LAION-5B have half of that
# A decoder passes over all pixels once per scan. Progressive JPEGs have about ten scans; libjpeg-turbo's tools stop at
# 500.
_MOST_SCANS = 500
_MOST_PASSES = 16  # scans times pixels are at most 16 times max_pixels


class Sample(TypedDict):
    """One sample without its image.

    label: Label of the image; -1 if there is none.
    key: Name of the sample.
    captions: Captions of the image, if the data have captions.
    mask: Class of each pixel, (H, W), uint8, if the data have class maps; 255 for a pixel to ignore.
    annotation: Objects at the size of the file, in plain data, if the data have objects.
    """

    label: int
    key: str
    captions: NotRequired[list[str]]
    mask: NotRequired[Tensor]
    annotation: NotRequired[Any]


class DecodedSample(Sample):
    """One decoded sample.

    image: Image, (3, H, W), uint8, RGB.
    """

    image: Tensor


def decode_sample(raw: dict[str, Any], labels: Labels, max_pixels: int = MAX_PIXELS) -> DecodedSample:
    """Decode the image of one raw sample, and read its label.

    Args:
        raw: Fields of the sample, undecoded.
        labels: Reads the label.
        max_pixels: Largest number of pixels of an image that is decoded.

    Raises:
        BadSample: If the sample has no image, the image is too large or cannot be decoded, or the label is bad.
    """
    encoded, label = check_sample(raw, labels)
    check_pixels(encoded, max_pixels)
    return {"image": decode_rgb(encoded), "label": label, "key": raw["__key__"]}


def check_pixels(encoded: bytes, max_pixels: int) -> None:
    """Check the size and the number of scans in the header of an image, before memory and time go into decoding it.

    Raises:
        BadSample: If the bytes are not a JPEG, PNG or WebP image, or the image has more than `max_pixels` pixels or too
            many scans.
    """
    try:
        width, height = pixel_size(encoded)
        scans = num_scans(encoded)
    except ValueError as error:
        raise BadSample("undecodable images", str(error)) from None
    if width * height > max_pixels:
        raise BadSample("giant images", f"{width:,} x {height:,} pixels")
    if scans > _MOST_SCANS or scans * width * height > _MOST_PASSES * max_pixels:
        raise BadSample("images of too many scans", f"{scans:,} scans of {width:,} x {height:,} pixels")


def check_sample(raw: dict[str, Any], labels: Labels) -> tuple[bytes, int]:
    """Return the encoded image and the label of one raw sample.

    Raises:
        BadSample: If the sample has no image, or its label is bad and `labels` does not accept bad labels.
    """
    return image_of(raw), labels.read(raw)


def image_of(raw: Mapping[str, Any]) -> bytes:
    """Return the encoded image of one raw sample.

    Raises:
        BadSample: If the sample has no image.
    """
    encoded: bytes | None = next((raw[extension] for extension in IMAGE_EXTENSIONS if extension in raw), None)
    if encoded is None:
        fields = sorted(name for name in raw if not name.startswith("__"))
        raise BadSample("samples without an image", f"fields: {', '.join(fields) or 'none'}")
    return encoded


def decode_rgb(encoded: bytes) -> Tensor:
    """Decode a JPEG, PNG or WebP image to (3, h, w) uint8, RGB. The orientation in EXIF is ignored.

    Raises:
        BadSample: If the bytes are not one whole image.
    """
    if not encoded:
        raise BadSample("undecodable images", "0 bytes")
    try:
        image: Tensor = decode_image(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except (RuntimeError, ValueError) as error:
        raise BadSample("undecodable images", str(error).splitlines()[0].partition(". ")[0][:80]) from None
    if image.ndim != 3:
        raise BadSample("undecodable images", f"{len(image):,} frames, where one is needed")
    return image if image.dtype == torch.uint8 else (image.to(torch.int32) >> 8).to(torch.uint8)  # PNG of 16 bits
