"""Visible positions, the scan over them from its definition, and a comparison with it."""

from typing import Any

import torch
from cross_scans import NAMES, TOLERANCES, error, leaves_of, wide
from torch import Tensor

from ssmpretrain.kernels.cross_scan import MODES, Mode, packed_cross_selective_scan, packed_orders
from ssmpretrain.kernels.cross_scan.routes import visiting_order
from ssmpretrain.kernels.selective_scan import selective_scan_reference


def draw_positions(batch: int, height: int, width: int, count: int) -> Tensor:
    """Return (B, L) ascending raster indices, drawn for every image by itself."""
    noise = torch.rand(batch, height * width, generator=torch.Generator().manual_seed(count))
    return noise.argsort(dim=1)[:, :count].sort(dim=1).values


def packed_scan_loop(
    x: Tensor, parameters: list[Tensor], mode: Mode, positions: Tensor, size: tuple[int, int]
) -> Tensor:
    """Scan image by image and route by route, stepping over every position that is not visible; x is (B, E, L)."""
    x_proj, dt_proj, dt_bias, A, D = parameters
    rank, state = dt_proj.shape[2], A.shape[2]
    images = []
    for image, visible in zip(x, positions.tolist(), strict=True):
        total = torch.zeros_like(image)
        for k, route in enumerate(MODES[mode] if isinstance(mode, str) else mode):
            visits = [visible.index(p) for p in visiting_order(route, *size).tolist() if p in visible]
            u = image[:, visits]
            dt, B, C = (x_proj[k] @ u).split([rank, state, state])
            inputs = (t.unsqueeze(0) for t in (u, dt_proj[k] @ dt))
            y = selective_scan_reference(*inputs, A[k], B[None], C[None], D[k], None, dt_bias[k], delta_softplus=True)
            assert isinstance(y, Tensor)
            total = total + y[0][:, [visits.index(i) for i in range(len(visible))]]
        images.append(total)
    return torch.stack(images)


def compare_packed(
    inputs: list[Tensor],
    positions: Tensor,
    size: tuple[int, int],
    mode: Mode = "cross",
    device: torch.device | None = None,
    **options: Any,
) -> None:
    """Compare the output and every gradient with the loop in float64."""
    truth_leaves = leaves_of(inputs, torch.float64)
    truth = packed_scan_loop(truth_leaves[0], truth_leaves[1:], mode, positions, size)
    grad = torch.randn_like(truth)
    truth_grads = torch.autograd.grad(truth, truth_leaves, grad)

    leaves = [leaf.detach().to(device).requires_grad_() for leaf in leaves_of(inputs)]
    orders = packed_orders(positions.to(device), *size, mode)
    out = packed_cross_selective_scan(*leaves, orders, mode=mode, **options)
    grads = torch.autograd.grad(out, leaves, grad.to(out))
    tolerance = {**TOLERANCES, torch.float64: 1e-14}[inputs[0].dtype]
    assert out.dtype == wide(inputs[0].dtype) and out.shape == inputs[0].shape
    assert error(out, truth) < tolerance
    for name, leaf, ours, expected in zip(NAMES, leaves, grads, truth_grads, strict=True):
        assert ours.dtype == leaf.dtype, name
        assert error(ours, expected) < tolerance, name
