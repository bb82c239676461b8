"""Clipping of each tensor's gradient by its own norm."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ssmpretrain.training.ranks.sharded_tensors import local

_EPS = 1e-6  # of the published code


@torch.no_grad()
def clip_each(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale the gradient of each parameter down to a norm of `max_norm`, by itself, in place.

    A gradient g becomes `g * min(1, max_norm / (|g| + 1e-6))`. Lightning's `gradient_clip_val` scales all gradients by
    one factor instead.

    Args:
        parameters: Parameters; those without a gradient are left out. Under FSDP2 the norm is that of the whole
            gradient, and every rank must call this.
        max_norm: Largest norm, above 0.

    Returns:
        The norms before clipping, (N,), of the N parameters with a gradient, in their order.

    Source: Caron et al. (arXiv:2104.14294) and Zhou et al. (arXiv:2111.07832), `clip_gradients` of their code.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(0)
    norms = gradient_norms(gradients)
    factors = (max_norm / (norms + _EPS)).clamp(max=1.0)
    torch._foreach_mul_([local(gradient) for gradient in gradients], list(factors.unbind()))
    return norms


def gradient_norms(gradients: list[Tensor]) -> Tensor:
    """Return the norm of each gradient, (N,). For sharded gradients every rank gets the same answer."""
    norms = torch.stack(torch._foreach_norm(gradients))
    return norms.full_tensor() if isinstance(norms, DTensor) else norms
