"""Resizing of images with their targets: the short side has a given length, unless the long side becomes too long."""

import math
from collections.abc import Sequence

from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules.decoding.decode import MAX_PIXELS


def fitted_size(size: tuple[int, int], short: float, longest: float) -> tuple[int, int]:
    """Return height and width of an image whose short side becomes `short`, unless the long side passes `longest`.

    The image keeps its aspect: both sides are multiplied by min(short / short side, longest / long side), rounded to
    whole pixels (halves up), and have at least one pixel.

    Args:
        size: Height and width of the image in pixels.
        short, longest: Length of the short side, and largest length of the long side, in pixels.

    Source: the rule of mmcv's `imrescale`, which the published ADE20K and COCO results use.
    """
    factor = min(short / min(size), longest / max(size))
    h, w = (max(1, math.floor(side * factor + 0.5)) for side in size)
    return h, w


def resize_image(image: Tensor, size: tuple[int, int], *, antialias: bool) -> Tensor:
    """Resize an image (3, h, w) uint8 to (3, *size) uint8, bilinearly."""
    if image.shape[-2:] == size:
        return image
    resized: Tensor = F.resize(image, list(size), InterpolationMode.BILINEAR, antialias=antialias)
    return resized


def resize_map(classes: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a class map (h, w) to `size`: each pixel takes the class of the nearest pixel centre.

    OpenCV's nearest rule, which mmseg uses, takes pixel floor(i h / H) of h in place of floor((i + 1/2) h / H). Its
    maps are shifted against the image by up to half a pixel.
    """
    if classes.shape == size:
        return classes
    resized: Tensor = F.resize(classes[None], list(size), InterpolationMode.NEAREST_EXACT)[0]
    return resized


def check_fitted_size(size: Sequence[int], name: str, where: str) -> tuple[int, int]:
    """Return (short, longest) of a setting that limits both sides of an image.

    Raises:
        DataError: If the setting is not two positive numbers of pixels in this order, or allows too many pixels.
    """
    sides = tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides) or sides[0] > sides[1]:
        raise DataError(
            f"{where}: {name} is the length of the short side and the largest length of the long side, in pixels; got "
            f"{list(size)}. Use [512, 2048], say."
        )
    if sides[0] * sides[1] > MAX_PIXELS:
        raise DataError(
            f"{where}: {name} allows at most {MAX_PIXELS:,} pixels; got {sides[0]:,} x {sides[1]:,}. Use [512, 2048], "
            "say."
        )
    return sides[0], sides[1]
