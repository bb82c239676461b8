"""Maps (B, E, H, W) as the kernels for the GPU read and write them: positions in rows, channels beside each other."""

import torch
from torch import Tensor


def channels_last(x: Tensor) -> Tensor:
    """Return a map (B, E, H, W) as (B, L, E), contiguous: a view where channels are last in memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2).contiguous()


def like_tokens(y: Tensor) -> Tensor:
    """Return where kernels write a map: its memory as (B, L, E) where channels are last, else a buffer."""
    rows = y.permute(0, 2, 3, 1)
    if rows.is_contiguous():
        return rows.flatten(1, 2)
    return torch.empty_like(rows, memory_format=torch.contiguous_format).flatten(1, 2)


def give_back(y: Tensor, out: Tensor) -> None:
    """Copy the buffer of `like_tokens`, where it made one, into the map."""
    rows = y.permute(0, 2, 3, 1)
    if not rows.is_contiguous():
        rows.copy_(out.view(rows.shape))
