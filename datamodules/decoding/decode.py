"""One sample decoded: its image within limits, and its label."""

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
# A decoder passes over all pixels once a scan. Progressive JPEGs have some ten; libjpeg-turbo's own tools stop at 500.
_MOST_SCANS = 500
_MOST_PASSES = 16  # over max_pixels


class DecodedSample(TypedDict):
    """One sample: image (3, H, W) uint8, label -1 when there is none, captions where the data have some."""

    image: Tensor
    label: int
    key: str
    captions: NotRequired[list[str]]


def decode_sample(raw: dict[str, Any], labels: Labels, max_pixels: int = MAX_PIXELS) -> DecodedSample:
    """Decode the image (RGB) of one raw sample, and read its label.

    Raises:
        BadSample: If it has no image, its image is too large or cannot be decoded, or its label is bad.
    """
    encoded, label = check_sample(raw, labels)
    check_pixels(encoded, max_pixels)
    return {"image": decode_rgb(encoded), "label": label, "key": raw["__key__"]}


def check_pixels(encoded: bytes, max_pixels: int) -> None:
    """Look at the header and scans of an image, before a decoder makes room and time for what they announce.

    Raises:
        BadSample: If it is no JPEG, PNG or WebP image, has more pixels, or would take long to decode.
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
        BadSample: If it has no image, or its label is bad and `labels` judges.
    """
    encoded = next((raw[extension] for extension in IMAGE_EXTENSIONS if extension in raw), None)
    if encoded is None:
        fields = sorted(name for name in raw if not name.startswith("__"))
        raise BadSample("samples without an image", f"fields: {', '.join(fields) or 'none'}")
    return encoded, labels.read(raw)


def decode_rgb(encoded: bytes) -> Tensor:
    """Decode a JPEG, PNG or WebP image to (3, h, w) uint8, pixels as they are stored: EXIF's orientation is ignored.

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
