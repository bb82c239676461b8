"""Centre crop of a resized image; of a long image, only the visible part is computed."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

_STRIP_FROM = 64  # if the resized image has 64 times the pixels of the crop, only the visible strip is computed
_MOST_WEIGHTS = 1 << 20  # number of weights that are computed at once

Weights = NDArray[np.float64]


def resized_centre_crop(
    image: Tensor, resized: tuple[int, int], size: tuple[int, int], interpolation: InterpolationMode
) -> Tensor:
    """Resize an image with antialiasing and crop its centre.

    The result equals torchvision's `resize` followed by `center_crop`, pixel by pixel. An image of 20,000 x 1 pixels
    would take 4 GB if it were resized to a shorter side of 256. Of such an image, only the strip that the crop shows is
    computed.

    Args:
        image: (3, h, w), uint8.
        resized: Height and width of the whole resized image, at least the height and width of the crop.
        size: Height and width of the crop.
        interpolation: Bicubic or bilinear.

    Returns:
        (3, H, W), uint8.
    """
    if math.prod(resized) >= _STRIP_FROM * math.prod(size):
        return strip_of_resized(image, resized, size, interpolation)
    whole = F.resize(image, list(resized), interpolation, antialias=True)
    cropped: Tensor = F.center_crop(whole, list(size))
    return cropped


def strip_of_resized(
    image: Tensor, resized: tuple[int, int], size: tuple[int, int], interpolation: InterpolationMode
) -> Tensor:
    """Compute `resized_centre_crop` of a long image. Other images give the same result, but take longer.

    This function resamples the long side with the weights and the fixed-point arithmetic of torch's kernel. torch
    resamples the short side. Without AVX2, torchvision resizes bilinear images in floating point; then the last bit
    may differ.
    """
    start = [round((whole - kept) / 2) for whole, kept in zip(resized, size, strict=True)]
    short = slice(start[1], start[1] + size[1])
    if resized[0] >= resized[1]:  # torch resamples the width first
        weights, bits, first = _fixed_point(image.shape[1], resized[0], start[0], size[0], interpolation)
        strip = image[:, first : first + weights.shape[1]]
        strip = F.resize(strip, [strip.shape[1], resized[1]], interpolation, antialias=True)[:, :, short]
        return _resampled(strip.mT, weights, bits).mT
    weights, bits, first = _fixed_point(image.shape[2], resized[1], start[1], size[1], interpolation)
    strip = _resampled(image[:, :, first : first + weights.shape[1]], weights, bits)
    whole: Tensor = F.resize(strip, [resized[0], size[1]], interpolation, antialias=True)
    return whole[:, start[0] : start[0] + size[0]]


def _resampled(image: Tensor, weights: Weights, bits: int) -> Tensor:
    """Resample the width; weights (W, w) are whole numbers of 2**-bits. Exact: no sum comes near 2**53."""
    sums = image.to(torch.float64) @ torch.from_numpy(weights).mT
    return sums.add_(1 << (bits - 1)).div_(1 << bits).floor_().clamp_(0, 255).to(torch.uint8)


def _fixed_point(
    old: int, new: int, start: int, count: int, interpolation: InterpolationMode
) -> tuple[Weights, int, int]:
    """Return the weights of `count` new pixels, from number `start`, when `old` pixels are resized to `new`.

    Returns:
        The weights, one row per new pixel and one column per old pixel, in units of 2**-bits; the number of bits; and
        the number of the old pixel in the first column.
    """
    first, weights = _weights(old, new, np.arange(start, start + count), interpolation)
    # Torch uses as many bits as the largest weight of the whole side allows. In an enlarged side, the largest weight
    # lies at one of the ends.
    ends = np.arange(new) if new <= max(old, 8) else np.r_[:4, new - 4 : new]
    parts = np.array_split(ends, 1 + len(ends) * weights.shape[1] // _MOST_WEIGHTS)
    largest = max(float(_weights(old, new, part, interpolation)[1].max()) for part in parts)
    bits = next(bits for bits in range(22) if bits == 21 or int(0.5 + largest * (1 << (bits + 1))) >= 1 << 15)
    whole = np.trunc(weights * (1 << bits) + np.copysign(0.5, weights))
    matrix = np.zeros((count, first[-1] - first[0] + weights.shape[1]))
    np.put_along_axis(matrix, (first - first[0])[:, None] + np.arange(weights.shape[1]), whole, axis=1)
    return matrix[:, : old - first[0]], bits, int(first[0])


def _weights(
    old: int, new: int, places: NDArray[np.int64], interpolation: InterpolationMode
) -> tuple[NDArray[np.int64], Weights]:
    """Return the first old pixel of each new pixel, and the weights of the old pixels from there; rows sum to 1."""
    cubic = interpolation is InterpolationMode.BICUBIC
    scale = old / new
    support = (2 if cubic else 1) * max(scale, 1.0)
    centre = scale * (places + 0.5)
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + support + 0.5).astype(np.int64), old)
    seen = first[:, None] + np.arange(2 * math.ceil(support) + 1)
    distance = np.abs(seen - centre[:, None] + 0.5) * min(1 / scale, 1.0)
    weights = np.where(seen < last[:, None], _cubic(distance) if cubic else np.maximum(1 - distance, 0), 0)
    return first, weights / weights.sum(axis=1, keepdims=True)


def _cubic(x: Weights) -> Weights:
    """Return Keys' cubic kernel with a = -1/2, the kernel of Pillow's bicubic interpolation."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((2.5 - 0.5 * x) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))
