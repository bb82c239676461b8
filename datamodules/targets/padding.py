"""Stacking of images of different sizes: normalised, and padded at the right and below."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ssmpretrain.datamodules.decoding.batch_memory import room_for


def stacked_size(sizes: Sequence[tuple[int, int]], least: tuple[int, int] = (1, 1)) -> tuple[int, int]:
    """Return the height and width of a batch that holds images of these sizes, and is at least `least`."""
    heights, widths = zip(*sizes, least, strict=True)
    return max(heights), max(widths)


def stack_images(
    images: Sequence[Tensor], mean: Tensor, std: Tensor, least: tuple[int, int] = (1, 1)
) -> tuple[Tensor, Tensor]:
    """Normalise images, pad them at the right and below with 0, and stack them.

    Args:
        images: B images, each (3, h, w), uint8.
        mean, std: Mean and standard deviation of each channel, for images in [0, 255], (3, 1, 1).
        least: Smallest height and width of the result.

    Returns:
        The images, (B, 3, H, W), float32, and height and width of each image without padding, (B, 2), int64.
    """
    sizes = [(image.shape[-2], image.shape[-1]) for image in images]
    stacked = room_for((len(images), 3, *stacked_size(sizes, least)))
    for row, image, (h, w) in zip(stacked, images, sizes, strict=True):  # one image at a time stays in the cache
        row[:, h:] = 0
        row[:, :h, w:] = 0
        torch.sub(image, mean, out=row[:, :h, :w]).div_(std)
    return stacked, torch.tensor(sizes)


def stack_maps(maps: Sequence[Tensor], size: tuple[int, int], fill: int) -> Tensor:
    """Pad maps at the right and below with one value, and stack them.

    Args:
        maps: B maps, each (h, w), uint8, at most as large as `size`.
        size: Height and width of the result.
        fill: Value of the padding, 0 to 255.

    Returns:
        The maps, (B, H, W), uint8.
    """
    stacked = torch.full((len(maps), *size), fill, dtype=torch.uint8)
    for row, each in zip(stacked, maps, strict=True):
        row[: each.shape[0], : each.shape[1]] = each
    return stacked
