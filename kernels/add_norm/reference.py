"""Residual sum and norm in PyTorch's own operations, one line per line of mathematics."""

# B batch, L tokens, D channels

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Norm = Literal["rms", "layer"]


def add_norm_reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm = "rms",
    eps: float = 1e-5,
    drop_path_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `add_norm`. All other implementations are tested against this one.

    Arguments and results are those of `add_norm`. Computes in float64 when x is float64, in float32 otherwise.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    branch = x.to(dtype)
    if drop_path_scale is not None:
        branch = branch * drop_path_scale.view(-1, 1, 1)
    total = branch.clone() if residual is None else residual.to(dtype) + branch
    shape, weight = weight.shape, weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    if norm == "layer":
        normed = F.layer_norm(total, shape, weight, bias, eps)
    else:
        normed = F.rms_norm(total, shape, weight, eps)
        normed = normed if bias is None else normed + bias
    return normed.to(out_dtype or x.dtype).contiguous(), total.contiguous()
