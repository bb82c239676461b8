"""The projector of LeJEPA: linear layers with batch normalisation over all ranks.

Legend: N vectors of all ranks, B vectors of this rank, D width of the encoder, C hidden width, K width of projections
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssmpretrain.training.ranks.sums import sum_over_ranks


class Projector(nn.Sequential):
    """Project features (B, D) to (B, K): linear layers, with batch normalisation and ReLU between them.

    The last layer starts such that projections have a mean square of 1, the scale that SIGReg asks for.

    Args:
        width: D.
        hidden: Widths C of the hidden layers, one or more.
        out: K.
    """

    def __init__(self, width: int, hidden: Sequence[int], out: int) -> None:
        layers: list[nn.Module] = []
        for before, after in zip([width, *hidden[:-1]], hidden, strict=True):
            layers += [nn.Linear(before, after), GlobalBatchNorm(after), nn.ReLU()]
        last = nn.Linear(hidden[-1], out)
        nn.init.normal_(last.weight, std=(2 / hidden[-1]) ** 0.5)  # the mean square after norm and ReLU is 1/2
        nn.init.zeros_(last.bias)
        super().__init__(*layers, last)


class GlobalBatchNorm(nn.Module):
    """Normalise each channel to mean 0 and variance 1 over the vectors of all ranks, then scale and shift it.

    The gradient goes through the statistics of all ranks, as in `nn.SyncBatchNorm`, which runs on GPUs only. Ranks may
    hold different numbers of vectors. There are no running averages: evaluation too takes the statistics of the batch.
    Statistics are in float32 at least.

    Args:
        width: C, channels.
        eps: Added to the variance, above 0.

    Source: Ioffe & Szegedy, "Batch Normalization" (arXiv:1502.03167), algorithm 1.
    """

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            wide = x if x.dtype == torch.float64 else x.float()
            total = sum_over_ranks(torch.cat([wide.sum(0), wide.new_full((1,), len(wide))]))
            n = total[-1]
            centred = wide - total[:-1] / n
            variance = sum_over_ranks(centred.square().sum(0)) / n
            return (centred * (variance + self.eps).rsqrt() * self.weight + self.bias).to(x.dtype)
