"""Memory layouts of maps (B, E, H, W): the caller's, and channels last, which the GPU kernels read and write."""

import torch
from torch import Tensor

from ssmpretrain.kernels.dispatch import is_transformed


def strided_like(x: Tensor, y: Tensor) -> Tensor:
    """Return y with the strides of x if x is dense. Under a transform there are no strides to keep: return y itself."""
    return y if is_transformed((x, y)) else torch.empty_like(x, dtype=y.dtype).copy_(y)


def channels_last(x: Tensor) -> Tensor:
    """Return a map (B, E, H, W) as (B, L, E), contiguous: a view where channels are last in memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2).contiguous()


def like_tokens(y: Tensor) -> Tensor:
    """Return the memory that kernels write a map to, (B, L, E): the map's own if channels are last, else a buffer."""
    rows = y.permute(0, 2, 3, 1)
    if rows.is_contiguous():
        return rows.flatten(1, 2)
    return torch.empty_like(rows, memory_format=torch.contiguous_format).flatten(1, 2)


def restore_layout(y: Tensor, out: Tensor) -> None:
    """Copy the buffer that `like_tokens` made into the map; do nothing if it made none."""
    rows = y.permute(0, 2, 3, 1)
    if not rows.is_contiguous():
        rows.copy_(out.view(rows.shape))
