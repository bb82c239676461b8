"""The gated norm in PyTorch's own operations."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmpretrain.kernels.dispatch import without_autocast


def gated_rms_norm_reference(x: Tensor, z: Tensor, weight: Tensor, *, eps: float = 1e-5, groups: int = 1) -> Tensor:
    """Compute `gated_rms_norm`. All other implementations are tested against this one.

    Arguments and result are those of `gated_rms_norm`. It computes in float64 if x is float64, else in float32.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with without_autocast(x.device.type):
        gated = torch.unflatten(x.to(dtype) * F.silu(z.to(dtype)), -1, (groups, -1))
        normed = F.rms_norm(gated, gated.shape[-1:], None, eps).flatten(-2)
        return (normed * weight.to(dtype)).to(x.dtype)
