"""Launch the decaying sum on the GPU."""

import torch
from torch import Tensor

from decay_scan import triton_kernels
from ssmpretrain.kernels.gpu.launch import launch as start

BLOCK = 32


def launch(x: Tensor, log_decay: Tensor, reverse: bool) -> Tensor:
    x, log_decay = x.contiguous(), log_decay.contiguous()
    y = torch.empty_like(x)
    batch, tokens, channels = x.shape
    start(
        triton_kernels.scan, (batch, -(-channels // BLOCK)), 1,
        x=x, log_decay=log_decay, y=y, tokens=tokens, channels=channels, REVERSE=reverse, BLOCK=BLOCK,
    )  # fmt: skip
    return y
