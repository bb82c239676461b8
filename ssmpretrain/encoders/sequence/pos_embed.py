"""Position embeddings of patches and class tokens: resizing, and the fixed sine-cosine table.

A table has one row per token, in the order of the sequence. With a class token in the middle of M patches, row M // 2
belongs to the class token, and the other rows belong to the grid of patches in raster order. The published code for
fine-tuning and dense tasks takes row 0 for the class token instead, which shifts half of the grid by one. Files that
were trained with that code load unchanged, because a grid of the right size is not resized.

    M = H x W patches, n class tokens, D channels
"""

import math

import torch
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.sequence.class_token import (
    class_positions,
    insert_class_tokens,
    remove_class_tokens,
    token_in_table,
)
from ssmpretrain.kernels.dispatch import without_autocast


def resize_grid(grid: Tensor, old_size: tuple[int, int], new_size: tuple[int, int]) -> Tensor:
    """Resample the rows of a grid to another grid size, bicubic as published, in float32 or float64.

    The result is that of `F.interpolate(mode="bicubic")` without antialiasing, computed as two matrix products. The
    backward pass of `F.interpolate` sums in no fixed order on a GPU, and it has no second derivative.

    Args:
        grid: Rows of the patches, (1, H * W, D), raster order, any floating-point dtype.
        old_size: (H, W), numbers of rows and columns of patches in `grid`.
        new_size: Numbers of rows and columns of patches in the result.

    Returns:
        The resized grid, (1, new H * new W, D), in the dtype of `grid`. If both sizes are equal, `grid` itself.

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
    """Return the matrix (new, old) that resamples `old` values to `new` ones, with the dtype and device of `like`.

    Each new value is a weighted sum of four old ones, by the cubic kernel of Keys with a = -0.75, as in PyTorch. The
    value at the border is repeated beyond it.
    """
    centres = (torch.arange(new, dtype=like.dtype, device=like.device).unsqueeze(1) + 0.5) * (old / new) - 0.5
    samples = centres.floor() + torch.arange(-1, 3, dtype=like.dtype, device=like.device)  # (new, 4)
    x = (centres - samples).abs()
    near, far = (1.25 * x - 2.25) * x * x + 1, ((-0.75 * x + 3.75) * x - 6) * x + 3
    weights = torch.where(x <= 1, near, far)
    return like.new_zeros(new, old).scatter_add(1, samples.clamp(0, old - 1).long(), weights)


def resize_pos_embed(table: Tensor, old_size: tuple[int, int], new_size: tuple[int, int], class_token: str) -> Tensor:
    """Resize a table (1, M + n, D) from one grid of patches to another, (1, new M + n, D).

    The rows of the class tokens keep their values and move to their places in the new sequence. With registers the
    table has no rows of class tokens, n = 0.

    Args:
        table: The table.
        old_size, new_size: (rows, columns) of patches.
        class_token: As in `class_positions`.
    """
    if old_size == new_size:
        return table
    inside = token_in_table(class_token)
    grid, class_rows = remove_class_tokens(table, inside)
    return insert_class_tokens(resize_grid(grid, old_size, new_size), class_rows, inside)


def square_side(table: Tensor | None, class_token: str) -> int | None:
    """Return H if a table (1, M + n, D) belongs to H x H patches; None if the patches form no square.

    Args:
        table: The table; None gives None.
        class_token: As in `class_positions`.
    """
    if table is None or table.ndim != 3:
        return None
    num_patches = table.shape[1] - len(class_positions(token_in_table(class_token), 0))
    side = math.isqrt(max(num_patches, 0))
    return side if side > 0 and side * side == num_patches else None


def sincos_pos_embed(embed_dim: int, grid_size: tuple[int, int]) -> Tensor:
    """Compute the fixed two-dimensional sine-cosine embedding of a grid of patches.

    The first half of the channels encodes the column x, the second half the row y, both counted in patches. Each half
    holds sin(x w_k) for all k, then cos(x w_k) for all k, with w_k = 10000^(-k / (D/4)).

    Args:
        embed_dim: D, divisible by 4.
        grid_size: (H, W), numbers of rows and columns of patches.

    Returns:
        The table, (1, H * W, D), float32, raster order.

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
