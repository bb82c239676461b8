"""The scans of VMamba along every route, one line of PyTorch per line of mathematics."""

# B batch, K routes, E channels, H x W map, L = H W, N state, R rank of the step size

from functools import partial

import torch
from torch import Tensor

from ssmpretrain.kernels.cross_scan.cascade import cascade
from ssmpretrain.kernels.cross_scan.inputs import CrossScanInputs
from ssmpretrain.kernels.cross_scan.layout import strided_like
from ssmpretrain.kernels.cross_scan.routes import Mode, routes_of
from ssmpretrain.kernels.cross_scan.sequences import cross_merge, cross_scan
from ssmpretrain.kernels.dispatch import without_autocast
from ssmpretrain.kernels.selective_scan.inputs import ScanInputs
from ssmpretrain.kernels.selective_scan.pytorch import PYTORCH_SCANS, PyTorchScan


def cross_selective_scan_reference(
    x: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    *,
    mode: Mode = "cross",
    scan: PyTorchScan = PYTORCH_SCANS["reference"],
) -> Tensor:
    """Compute `cross_selective_scan` in PyTorch's own operations.

    All other implementations are tested against this one. Arguments and result are those of `cross_selective_scan`.

    Args:
        scan: The selective scan inside, of `PYTORCH_SCANS`.
    """
    inputs = CrossScanInputs(x, x_proj, dt_proj, dt_bias, A, D, routes_of("cross_selective_scan", mode))
    along_routes = partial(_scan_along_routes, scan=scan)
    return cascade(along_routes, inputs) if mode == "cascade" else along_routes(inputs)


def _scan_along_routes(inputs: CrossScanInputs, scan: PyTorchScan) -> Tensor:
    x, x_proj, dt_proj, dt_bias, A, D, routes = inputs
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
        y, _ = scan(ScanInputs(u_all, delta_all, A, B, C, D, None, dt_bias, delta_softplus=True, reverse=False))
        return strided_like(x, cross_merge(y.reshape(u.shape), (x.shape[2], x.shape[3]), routes))
