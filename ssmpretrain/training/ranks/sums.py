"""Sums over all ranks that carry gradients, for losses whose statistics are those of the global batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssmpretrain.base import ranks


def sum_over_ranks(x: Tensor) -> Tensor:
    """Return the sum of `x` over all ranks, differentiable; every rank calls it, with tensors of one shape and dtype.

    The gradient that a rank gets is the sum of the gradients of all ranks. If every rank computes the same loss from
    the sum, and the gradients of the parameters are then averaged, as DDP and FSDP2 do, the parameters get the gradient
    of that loss over the global batch. In a single process the result is `x`.
    """
    if ranks.world() == 1:
        return x
    summed: Tensor = _Sum.apply(x)  # type: ignore[no-untyped-call]
    return summed


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _summed(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _summed(gradient)


def _summed(x: Tensor) -> Tensor:
    summed = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(summed)
    return summed
