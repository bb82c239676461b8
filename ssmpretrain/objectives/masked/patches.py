"""Images as patches, and masks that hide some of them.

Legend: B images, L patches, K kept patches, H x W pixels, h x w grid of patches, p patch side, m patches along the side
of a mask unit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.family_registry import choices, family_of


class Mask(NamedTuple):
    """Mask of the hidden patches of each image.

    Attributes:
        hidden: True for hidden patches, (B, L), bool.
        keep: Raster indices of the visible patches, (B, K), int64, ascending, because a scan reads in order.
    """

    hidden: Tensor
    keep: Tensor


def random_mask(
    B: int,
    grid: tuple[int, int],
    mask_ratio: float,
    device: torch.device,
    generator: torch.Generator | None = None,
    unit: int = 1,
) -> Mask:
    """Hide squares of `unit` x `unit` patches, drawn uniformly, with the same number in each image.

    Args:
        B: Number of images.
        grid: h, w: patches along both sides, multiples of `unit`. The grid must have more than one square.
        mask_ratio: Fraction of the squares to hide, in (0, 1). It is rounded to whole squares; at least one square is
            hidden and one visible.
        device: Device of the result and of `generator`.
        generator: Random generator that fixes the draw; None for the global one.
        unit: m, patches along the side of a square.
    """
    rows, columns = grid[0] // unit, grid[1] // unit
    count = rows * columns
    num_hidden = min(max(round(count * mask_ratio), 1), count - 1)
    chosen = torch.rand(B, count, device=device, generator=generator).argsort(dim=1)[:, :num_hidden]
    squares = torch.zeros(B, count, dtype=torch.bool, device=device).scatter(1, chosen, True).view(B, rows, columns)
    hidden = squares.repeat_interleave(unit, 1).repeat_interleave(unit, 2).flatten(1)
    visible_first = hidden.to(torch.uint8).argsort(dim=1, stable=True)
    return Mask(hidden, visible_first[:, : (count - num_hidden) * unit**2])


def unit_in_patches(where: str, mask_unit: int | None, patch_size: int) -> int:
    """Return m, the patches along the side of a mask unit.

    Args:
        where: Start of error messages, such as the name of the objective.
        mask_unit: Side of the unit in pixels; None for one patch.
        patch_size: p, side of a patch in pixels.

    Raises:
        ValueError: If `mask_unit` is no multiple of the patch.
    """
    if mask_unit is None:
        return 1
    if mask_unit < patch_size or mask_unit % patch_size:
        raise UserError(
            f"{where}: mask_unit is a multiple of the encoder's patch, {patch_size} pixels; got {mask_unit}. "
            f"Set it to {max(1, round(mask_unit / patch_size)) * patch_size}."
        )
    return mask_unit // patch_size


def hideable_patch(where: str, encoder: nn.Module, name: str, instead: str) -> int:
    """Return p, the side in pixels of the patches that an encoder can leave out.

    Args:
        where: Start of error messages, such as the name of the objective.
        encoder: The encoder.
        name: Name of the encoder, for messages.
        instead: Remedy in the message, besides the choice of another encoder.

    Raises:
        ValueError: If the encoder cannot run on the visible patches alone.
    """
    try:
        side = family_of(encoder).patch_side(encoder)
    except ValueError as error:
        raise UserError(f"{where}: {name}: {error}") from error
    if side is None:
        able = choices(lambda family: family.hides_patches)
        raise UserError(
            f"{where}: the encoder runs on the visible patches alone; {name!r} cannot. Choose {able}; or {instead}."
        )
    return side


def patch_grid(where: str, size: tuple[int, int], patch_size: int, unit: int = 1) -> tuple[int, int]:
    """Return the grid h, w of images of H x W pixels.

    Args:
        where: Start of error messages, such as the name of the objective.
        size: H, W.
        patch_size: p, side of a patch in pixels.
        unit: m, patches along the side of a mask unit.

    Raises:
        ValueError: If the sides are no multiples of the mask unit, or the image is a single unit.
    """
    side = patch_size * unit
    if size[0] % side or size[1] % side or size[0] * size[1] < 2 * side * side:
        raise UserError(
            f"{where}: images are grids of two or more squares of {side} x {side} pixels, which are "
            f"seen or hidden as a whole; got {size[0]} x {size[1]} pixels. "
            f"Set data.image_size to a multiple of {side}, {2 * side} or more."
        )
    return size[0] // patch_size, size[1] // patch_size


def on_pixels(hidden: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Enlarge a mask of patches (B, h * w) to a mask of pixels (B, 1, H, W)."""
    mask = hidden.view(-1, 1, *grid)
    return mask.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images (B, 3, H, W) into patches (B, L, p * p * 3) in raster order; pixels row by row, channels last."""
    B, C, H, W = images.shape
    p = patch_size
    return images.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1).reshape(B, -1, p * p * C)


def unpatchify(patches: Tensor, patch_size: int, size: tuple[int, int]) -> Tensor:
    """Put patches (B, L, p * p * 3) back together as images (B, 3, H, W); the inverse of `patchify`."""
    p, (H, W) = patch_size, size
    return patches.reshape(len(patches), H // p, W // p, p, p, 3).permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, H, W)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mean and standard deviation, (B, L, 1) each, of the pixels of each patch (B, L, p * p * 3)."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()  # 1e-6 as in MAE's code; it keeps a patch of one colour finite
