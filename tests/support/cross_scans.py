"""Inputs of cross scans, and their comparison with the float64 reference."""

from typing import Any

import torch
from torch import Tensor

from ssmpretrain.kernels.cross_scan import Mode, cross_selective_scan, cross_selective_scan_reference

# Norm of the error over norm of the result. float32: roundings of 6e-8 through a product over the channels, an exp2
# good to 1e-7 per step and the decaying state. bfloat16 and float16: the truth rounds nothing, we round x and the
# projections, 2^-9 or 2^-11 each, and a gradient passes through several of those.
TOLERANCES = {torch.float32: 4e-6, torch.bfloat16: 1.5e-2, torch.float16: 4e-3}

NAMES = ("x", "x_proj", "dt_proj", "dt_bias", "A", "D")
WINDOWS = ("h", "w2_flip", "v", "w7", "w7_flip")


def make_inputs(
    batch: int, channels: int, height: int, width: int, state: int, rank: int = 3, routes: int = 4
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(channels * height + state)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return [
        normal(batch, channels, height, width),
        normal(routes, rank + 2 * state, channels) * channels**-0.5,
        normal(routes, channels, rank) * rank**-0.5,
        0.5 * normal(routes, channels) - 2,
        -0.1 - 4 * torch.rand(routes, channels, state, generator=generator),
        normal(routes, channels),
    ]


def leaves_of(inputs: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the sum over the routes of a map of this dtype."""
    return torch.promote_types(dtype, torch.float32)


def error(ours: Tensor, truth: Tensor) -> float:
    scale = truth.norm() if truth.norm() > 0 else torch.ones(())
    return float(((ours.cpu().double() - truth).norm() / scale).detach())


def compare(
    inputs: list[Tensor],
    mode: Mode = "cross",
    scan: Any = cross_selective_scan,
    device: torch.device | None = None,
    **options: Any,
) -> None:
    """Compare the output and every gradient with the float64 reference."""
    truth_leaves = leaves_of(inputs, torch.float64)
    truth = cross_selective_scan_reference(*truth_leaves, mode=mode)
    grad = torch.randn_like(truth)
    truth_grads = torch.autograd.grad(truth, truth_leaves, grad)

    x = inputs[0]
    leaves = [leaf.detach().to(device).requires_grad_() for leaf in leaves_of(inputs)]
    out = scan(*leaves, mode=mode, **options)
    grads = torch.autograd.grad(out, leaves, torch.empty_like(out).copy_(grad))
    assert out.dtype == wide(x.dtype) and out.stride() == torch.empty_like(x).stride()
    assert error(out, truth) < TOLERANCES[x.dtype]
    for name, leaf, ours, expected in zip(NAMES, leaves, grads, truth_grads, strict=True):
        assert ours.dtype == leaf.dtype and ours.shape == leaf.shape, name
        assert error(ours, expected) < TOLERANCES[x.dtype], name
