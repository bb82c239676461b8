"""Maps (B, E, H, W) in memory: as a caller gives them, and as the kernels for the GPU read and write them, positions in
rows and channels beside each other."""

import torch
from torch import Tensor

from ssmpretrain.kernels.dispatch import is_transformed


def strided_like(x: Tensor, y: Tensor) -> Tensor:
    """Return y with the strides of x where x is dense; as it is under a transform, which has no strides to keep."""
    return y if is_transformed((x, y)) else torch.empty_like(x, dtype=y.dtype).copy_(y)


def channels_last(x: Tensor) -> Tensor:
    """Return a map (B, E, H, W) as (B, L, E), contiguous: a view where channels are last in memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2).contiguous()


def like_tokens(y: Tensor) -> Tensor:
    """Return where kernels write a map: its memory as (B, L, E) where channels are last, else a buffer."""
    rows = y.permute(0, 2, 3, 1)
    if rows.is_contiguous():
        return rows.flatten(1, 2)
    return torch.empty_like(rows, memory_format=torch.contiguous_format).flatten(1, 2)


def restore_layout(y: Tensor, out: Tensor) -> None:
    """Copy the buffer of `like_tokens`, where it made one, into the map."""
    rows = y.permute(0, 2, 3, 1)
    if not rows.is_contiguous():
        rows.copy_(out.view(rows.shape))
