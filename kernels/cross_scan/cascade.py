"""VMamba's cascade: scan all rows, then all columns, each as a sequence of its own."""

# B batch, E channels, H x W map

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from ssmpretrain.kernels.cross_scan.inputs import CrossScanInputs
from ssmpretrain.kernels.cross_scan.layout import strided_like
from ssmpretrain.kernels.cross_scan.routes import MODES

_EPS = 1e-5


def cascade(scan: Callable[[CrossScanInputs], Tensor], inputs: CrossScanInputs) -> Tensor:
    """Scan every row both ways, normalise over the channels without weights, scan every column both ways.

    Args:
        scan: Scans a batch of maps along two routes.
        inputs: A map and K = 4 sets of parameters: rows forward, rows backward, columns down, columns up.
    """
    x = inputs.x
    rows = _scan_rows(scan, x, inputs, slice(0, 2)).movedim(1, -1)
    normed = F.layer_norm(rows, rows.shape[-1:], eps=_EPS).to(x.dtype).movedim(-1, 1)
    columns = _scan_rows(scan, normed.mT, inputs, slice(2, 4)).mT
    return strided_like(x, columns)


def _scan_rows(scan: Callable[[CrossScanInputs], Tensor], x: Tensor, inputs: CrossScanInputs, sets: slice) -> Tensor:
    """Scan (B, E, H, W) as B H maps of one row each, with two of the sets of parameters."""
    batch, channels, height, width = x.shape
    rows = x.transpose(1, 2).reshape(batch * height, channels, 1, width)
    x_proj, dt_proj, dt_bias, A, D = (p[sets] for p in inputs.parameters)
    y = scan(CrossScanInputs(rows, x_proj, dt_proj, dt_bias, A, D, MODES["cascade"][:2]))
    return y.view(batch, height, channels, width).transpose(1, 2)
