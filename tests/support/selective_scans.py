"""Inputs of selective scans, and their comparison with the float64 reference."""

from typing import Any

import torch
from torch import Tensor

from ssmpretrain.kernels.selective_scan import selective_scan, selective_scan_reference
from ssmpretrain.kernels.selective_scan.chunked import scan_in_chunks
from ssmpretrain.kernels.selective_scan.inputs import ScanInputs

# Norm of the error over norm of the result. float32: some 30 roundings of 6e-8 and an exp2 good to 1e-7 per step, fed
# forward by a decaying state. bfloat16: one rounding of the result, 2^-9, as the inputs are the same on both sides.
TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def make_inputs(
    batch: int,
    channels: int,
    tokens: int,
    state: int,
    groups: int | None = None,
    *,
    softplus: bool = True,
    optional: bool = True,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(channels * tokens + state)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows = (batch, state, tokens) if groups is None else (batch, groups, state, tokens)
    delta = normal(batch, channels, tokens) - 1
    inputs = {
        "u": normal(batch, channels, tokens).to(dtype),
        "delta": (delta if softplus else 0.1 * delta.abs()).to(dtype),
        "A": -0.1 - 4 * torch.rand(channels, state, generator=generator),
        "B": normal(*rows).to(dtype),
        "C": normal(*rows).to(dtype),
    }
    if optional:
        inputs["D"] = normal(channels)
        inputs["z"] = normal(batch, channels, tokens).to(dtype)
        inputs["delta_bias"] = 0.1 * normal(channels)
    return inputs


def leaf(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return tensor.detach().to(dtype or tensor.dtype).requires_grad_()


def error(ours: Tensor, truth: Tensor) -> float:
    return float(((ours.cpu().double() - truth).norm() / truth.norm().clamp_min(1e-30)).detach())


def compare(inputs: dict[str, Tensor], impl: str = "cpu", device: torch.device | str = "cpu", **options: Any) -> None:
    """Compare the output, the last state and every gradient with the float64 reference."""
    truth_inputs = {name: leaf(t, torch.float64) for name, t in inputs.items()}
    truth, truth_last = selective_scan_reference(**truth_inputs, return_last_state=True, **options)
    grad, grad_last = torch.randn_like(truth), torch.randn_like(truth_last)
    truth_grads = torch.autograd.grad([truth, truth_last], list(truth_inputs.values()), [grad, grad_last])

    ours_inputs = {name: leaf(t.to(device)) for name, t in inputs.items()}
    if impl == "chunked":
        out, last = scan_in_chunks(ScanInputs(**ours_inputs, **options))
    else:
        out, last = selective_scan(**ours_inputs, return_last_state=True, impl=impl, **options)
    grads = torch.autograd.grad([out, last], list(ours_inputs.values()), [grad.to(out), grad_last.to(last)])

    assert out.dtype == inputs["u"].dtype
    assert last.dtype == torch.float32
    assert error(out, truth) < TOLERANCES[out.dtype]
    # float16 and bfloat16 gradients of y are rounded before they enter
    slack = 2 * TOLERANCES[out.dtype]
    assert error(last, truth_last) < TOLERANCES[torch.float32]
    for name, ours, expected in zip(inputs, grads, truth_grads, strict=True):
        assert ours.dtype == inputs[name].dtype, name
        assert ours.shape == inputs[name].shape, name
        scale = expected.norm() if expected.norm() > 0 else torch.ones(())
        assert float((ours.cpu().double() - expected).norm() / scale) < max(slack, TOLERANCES[ours.dtype]), name
