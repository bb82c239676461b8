"""Position embeddings of a patch grid with class tokens in between: split, resize, merge, and the fixed sine-cosine
table.

A table has one row per token, in the order of the sequence that it is added to. With a class token in the middle of M
patches, row M // 2 belongs to the class token and the other rows are the grid in raster order. (The published
fine-tuning and dense code reads row 0 as the class token's instead, which shifts half of the grid by one; files
trained that way load unchanged, because equal grids are not resized.)

    M = H x W patches, n class tokens, D channels
"""

import math

import torch
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.sequence.class_token import class_positions, insert_class_tokens, remove_class_tokens
from ssmpretrain.kernels.dispatch import without_autocast


def split_pos_embed(table: Tensor, class_token: str) -> tuple[Tensor, Tensor]:
    """Split a table (1, M + n, D) into the grid's rows (1, M, D), raster order, and the class tokens' (1, n, D)."""
    return remove_class_tokens(table, class_token)


def merge_pos_embed(grid: Tensor, class_rows: Tensor, class_token: str) -> Tensor:
    """Put the grid's rows (1, M, D) and the class tokens' rows (1, n, D) back into one table (1, M + n, D)."""
    return insert_class_tokens(grid, class_rows, class_token)


def resize_grid(grid: Tensor, old_size: tuple[int, int], new_size: tuple[int, int]) -> Tensor:
    """Resample the rows of a grid to another grid size: bicubic as published, in float32 or wider.

    The numbers of `F.interpolate(mode="bicubic")`, without antialiasing, as two matrix products: its own backward pass
    adds up in any order on a GPU and has no derivative.

    Args:
        grid: (1, H * W, D), raster order, any floating dtype.
        old_size: (H, W), rows and columns of `grid`.
        new_size: Rows and columns wanted.

    Returns:
        (1, new H * new W, D) in the dtype of `grid`; `grid` itself when the sizes agree.

    Source: the loaders of hustvl/Vim (vim/main.py), OliverRensu/ARM and facebookresearch/mae (util/pos_embed.py).
    """
    if old_size == new_size:
        return grid
    assert grid.shape[1] == old_size[0] * old_size[1], (grid.shape, old_size)
    with without_autocast(grid.device.type):
        image = grid.reshape(*old_size, -1).to(torch.promote_types(grid.dtype, torch.float32))  # (H, W, D)
        to_rows, to_columns = (_resampling(old, new, image) for old, new in zip(old_size, new_size, strict=True))
        image = to_columns @ (to_rows @ image.flatten(1)).view(new_size[0], *image.shape[1:])
        return image.flatten(0, 1).unsqueeze(0).to(grid.dtype)


def _resampling(old: int, new: int, like: Tensor) -> Tensor:
    """Return the weights that make `new` samples of `old` ones, (new, old), in dtype and on the device of `like`.

    Keys' cubic with a = -0.75, as PyTorch has it, of four samples; for one beyond the border stands the last before it.
    """
    centres = (torch.arange(new, dtype=like.dtype, device=like.device).unsqueeze(1) + 0.5) * (old / new) - 0.5
    samples = centres.floor() + torch.arange(-1, 3, dtype=like.dtype, device=like.device)  # (new, 4)
    x = (centres - samples).abs()
    near, far = (1.25 * x - 2.25) * x * x + 1, ((-0.75 * x + 3.75) * x - 6) * x + 3
    weights = torch.where(x <= 1, near, far)
    return like.new_zeros(new, old).scatter_add(1, samples.clamp(0, old - 1).long(), weights)


def resize_pos_embed(table: Tensor, old_size: tuple[int, int], new_size: tuple[int, int], class_token: str) -> Tensor:
    """Resize the grid part of a table (1, M + n, D); the class tokens' rows keep their values at new places."""
    if old_size == new_size:
        return table
    grid, class_rows = split_pos_embed(table, class_token)
    return merge_pos_embed(resize_grid(grid, old_size, new_size), class_rows, class_token)


def square_side(table: Tensor | None, class_token: str) -> int | None:
    """Return the rows of patches if a table (1, M + n, D) belongs to a square of them."""
    if table is None or table.ndim != 3:
        return None
    num_patches = table.shape[1] - len(class_positions(class_token, 0))
    side = math.isqrt(max(num_patches, 0))
    return side if side > 0 and side * side == num_patches else None


def sincos_pos_embed(embed_dim: int, grid_size: tuple[int, int]) -> Tensor:
    """Compute the fixed 2-D sine-cosine embedding of a grid, coordinates counted in patches.

    The first half of the channels encodes the column, the second the row; within each half, sin(x w_k) for all k, then
    cos(x w_k), with w_k = 10000^(-k / (D/4)).

    Args:
        embed_dim: D, divisible by 4.
        grid_size: (H, W), rows and columns.

    Returns:
        (1, H * W, D), float32, raster order.

    Raises:
        ValueError: If `embed_dim` is not divisible by 4.

    Source: He et al., "Masked Autoencoders Are Scalable Vision Learners" (arXiv:2111.06377), appendix A.1, and its
        code.
    """
    if embed_dim % 4:
        raise UserError(f"sincos position embedding: embed_dim is divisible by 4; got {embed_dim}.")
    quarter = embed_dim // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = (torch.arange(size, dtype=torch.float64) for size in grid_size)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    angles = [coordinate.reshape(-1, 1) * frequencies for coordinate in (x, y)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1).float().unsqueeze(0)
