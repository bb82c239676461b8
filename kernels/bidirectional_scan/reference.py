"""The bidirectional scan of Vim, one line of PyTorch per line of mathematics."""

# B batch, L tokens, E channels, N state, R rank of the step size, W width of the convolution

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmpretrain.kernels.bidirectional_scan.inputs import ScanDirection
from ssmpretrain.kernels.dispatch import without_autocast
from ssmpretrain.kernels.selective_scan.inputs import ScanInputs
from ssmpretrain.kernels.selective_scan.pytorch import PYTORCH_SCANS, PyTorchScan


def bidirectional_scan_reference(
    xz: Tensor,
    forward: ScanDirection,
    backward: ScanDirection | None = None,
    *,
    divide_output: bool = True,
    scan: PyTorchScan = PYTORCH_SCANS["reference"],
) -> Tensor:
    """Compute `bidirectional_scan` in PyTorch's own operations.

    All other implementations are tested against this one. Arguments and result are those of `bidirectional_scan`.

    Args:
        scan: The selective scan inside, of `PYTORCH_SCANS`.
    """
    with without_autocast(xz.device.type):
        x, z = xz.chunk(2, dim=-1)
        y = _one_direction(x, forward, scan, reverse=False)
        if backward is not None:
            y = y + _one_direction(x, backward, scan, reverse=True)
            if divide_output:
                y = 0.5 * y
        return (y * F.silu(z.to(y.dtype))).to(xz.dtype).contiguous()


def _one_direction(x: Tensor, p: ScanDirection, scan: PyTorchScan, *, reverse: bool) -> Tensor:
    """Return `scan(...) + D u` of one direction, (B, L, E), float32 or float64."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rank = p.dt_proj.shape[1]
    state = p.A.shape[1]
    width = p.conv_weight.shape[1]

    taps = p.conv_weight.flip(-1) if reverse else p.conv_weight
    padding = (0, width - 1) if reverse else (width - 1, 0)
    pre = F.conv1d(
        F.pad(x.to(dtype).mT, padding), taps.to(dtype).unsqueeze(1), p.conv_bias.to(dtype), groups=x.shape[-1]
    )
    u = F.silu(pre).mT.to(x.dtype)  # (B, L, E)

    x_dbl = (u @ p.x_proj.to(x.dtype).mT).to(dtype)
    dt_raw, B, C = torch.split(x_dbl, [rank, state, state], dim=-1)
    delta = dt_raw @ p.dt_proj.to(x.dtype).to(dtype).mT
    y, _ = scan(ScanInputs(u.to(dtype).mT, delta.mT, p.A, B.mT, C.mT, p.D, None, p.dt_bias, True, reverse))
    return y.mT
