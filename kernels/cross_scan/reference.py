"""The scans of VMamba along every route, one line of PyTorch per line of mathematics."""

# B batch, K routes, E channels, H x W map, L = H W, N state, R rank of the step size

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ssmpretrain.kernels.cross_scan.cascade import cascade
from ssmpretrain.kernels.cross_scan.layout import strided_like
from ssmpretrain.kernels.cross_scan.routes import Mode, routes_of
from ssmpretrain.kernels.cross_scan.sequences import cross_merge, cross_scan
from ssmpretrain.kernels.dispatch import without_autocast
from ssmpretrain.kernels.selective_scan import selective_scan_reference


def cross_selective_scan_reference(
    x: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    *,
    mode: Mode = "cross",
    scan: Callable[..., Tensor | tuple[Tensor, Tensor]] = selective_scan_reference,
) -> Tensor:
    """Compute `cross_selective_scan` from PyTorch's own operations; the oracle of every other implementation.

    Arguments and result as in `cross_selective_scan`; scan replaces the selective scan inside.
    """
    if mode == "cascade":
        return cascade(partial(cross_selective_scan_reference, scan=scan), x, x_proj, dt_proj, dt_bias, A, D)
    routes = routes_of("cross_selective_scan", mode)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rank, state = dt_proj.shape[2], A.shape[2]
    with without_autocast(x.device.type):
        u = cross_scan(x, routes).to(dtype)  # (B, K, E, L)
        x_dbl = x_proj.to(x.dtype).to(dtype) @ u  # (B, K, R + 2N, L)
        dt_raw, B, C = torch.split(x_dbl, [rank, state, state], dim=2)
        delta = dt_proj.to(x.dtype).to(dtype) @ dt_raw  # (B, K, E, L)

        # one scan over K E channels, in K groups with a B and C of their own
        u_all, delta_all = u.flatten(1, 2), delta.flatten(1, 2)
        A, D, dt_bias = A.flatten(0, 1), D.flatten(), dt_bias.flatten()
        y = scan(u_all, delta_all, A, B, C, D, None, dt_bias, delta_softplus=True)
        assert isinstance(y, Tensor)
        return strided_like(x, cross_merge(y.reshape(u.shape), (x.shape[2], x.shape[3]), routes))
