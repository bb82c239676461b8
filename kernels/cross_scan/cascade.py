"""VMamba's cascade: rows first, then columns, each a sequence of its own. Composed of one-row scans."""

# B batch, E channels, H x W map

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from ssmpretrain.kernels.cross_scan.layout import strided_like
from ssmpretrain.kernels.cross_scan.routes import MODES

_EPS = 1e-5


def cascade(scan: Callable[..., Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
    """Scan every row both ways, normalise over the channels without weights, scan every column both ways.

    Args:
        scan: Called with a batch of one-row maps, their parameters and mode=routes.
        x: Map, (B, E, H, W).
        parameters: Those of `cross_selective_scan` with K = 4: rows forward, rows backward, columns down, columns up.
    """
    routes = MODES["cascade"][:2]
    rows = _along_rows(scan, x, *(p[:2] for p in parameters), mode=routes).movedim(1, -1)
    normed = F.layer_norm(rows, rows.shape[-1:], eps=_EPS).to(x.dtype).movedim(-1, 1)
    columns = _along_rows(scan, normed.mT, *(p[2:] for p in parameters), mode=routes).mT
    return strided_like(x, columns)


def _along_rows(scan: Callable[..., Tensor], x: Tensor, *parameters: Tensor, mode: tuple[str, ...]) -> Tensor:
    """Scan (B, E, H, W) as B H maps of one row each."""
    batch, channels, height, width = x.shape
    rows = x.transpose(1, 2).reshape(batch * height, channels, 1, width)
    return scan(rows, *parameters, mode=mode).view(batch, height, channels, width).transpose(1, 2)
