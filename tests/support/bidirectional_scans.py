"""Inputs of bidirectional scans, and their comparison with the float64 reference."""

from typing import Any

import torch
from torch import Tensor

from ssmpretrain.kernels.bidirectional_scan import ScanDirection, bidirectional_scan, bidirectional_scan_reference

# Norm of the error over norm of the result. float32: roundings of 6e-8 through a product over the channels, an exp2
# good to 1e-7 per step and the decaying state. bfloat16 and float16: the truth rounds nothing, we round u, the
# projections and the result, 2^-9 or 2^-11 each, and a gradient passes through several of those.
TOLERANCES = {torch.float32: 4e-6, torch.bfloat16: 1.5e-2, torch.float16: 4e-3}


def make_direction(channels: int, state: int, rank: int, taps: int, generator: torch.Generator) -> ScanDirection:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return ScanDirection(
        conv_weight=0.5 * normal(channels, taps),
        conv_bias=0.1 * normal(channels),
        x_proj=normal(rank + 2 * state, channels) * channels**-0.5,
        dt_proj=normal(channels, rank) * rank**-0.5,
        dt_bias=0.5 * normal(channels) - 2,
        A=-0.1 - 4 * torch.rand(channels, state, generator=generator),
        D=normal(channels),
    )


def make_inputs(
    batch: int, channels: int, tokens: int, state: int, rank: int = 3, taps: int = 4
) -> tuple[Tensor, ScanDirection, ScanDirection]:
    generator = torch.Generator().manual_seed(channels * tokens + state)
    xz = torch.randn(batch, tokens, 2 * channels, generator=generator)
    first, second = (make_direction(channels, state, rank, taps, generator) for _ in range(2))
    return xz, first, second


def leaves_of(xz: Tensor, *directions: ScanDirection | None, dtype: torch.dtype | None = None) -> list[Tensor]:
    tensors = [xz, *(t for d in directions if d is not None for t in d)]
    return [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]


def run(implementation: Any, leaves: list[Tensor], **options: Any) -> Tensor:
    xz, *rest = leaves
    second = ScanDirection(*rest[7:]) if len(rest) > 7 else None
    out = implementation(xz, ScanDirection(*rest[:7]), second, **options)
    assert isinstance(out, Tensor)
    return out


def error(ours: Tensor, truth: Tensor) -> float:
    scale = truth.norm() if truth.norm() > 0 else torch.ones(())
    return float(((ours.cpu().double() - truth).norm() / scale).detach())


def compare(
    xz: Tensor,
    *directions: ScanDirection | None,
    divide_output: bool = True,
    device: torch.device | str = "cpu",
    **options: Any,
) -> None:
    """Compare the output and every gradient with the float64 reference."""
    truth_leaves = leaves_of(xz, *directions, dtype=torch.float64)
    truth = run(bidirectional_scan_reference, truth_leaves, divide_output=divide_output)
    grad = torch.randn_like(truth)
    truth_grads = torch.autograd.grad(truth, truth_leaves, grad)

    leaves = [leaf.detach().to(device).requires_grad_() for leaf in leaves_of(xz, *directions)]
    scan = bidirectional_scan_reference if "scan" in options else bidirectional_scan
    out = run(scan, leaves, divide_output=divide_output, **options)
    grads = torch.autograd.grad(out, leaves, grad.to(out))
    tolerance = TOLERANCES[xz.dtype]
    assert out.dtype == xz.dtype and out.is_contiguous()
    assert error(out, truth) < tolerance
    names = ["xz", *ScanDirection._fields, *ScanDirection._fields]
    for name, leaf, ours, expected in zip(names, leaves, grads, truth_grads, strict=False):
        assert ours.dtype == leaf.dtype and ours.shape == leaf.shape, name
        assert error(ours, expected) < tolerance, name
