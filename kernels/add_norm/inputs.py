"""The inputs of `add_norm` and what its backward pass keeps, named and described once for all its implementations."""

from typing import NamedTuple

import torch
from torch import Tensor


class AddNormInputs(NamedTuple):
    """Tensors and options of one call. B batch, L tokens, D channels."""

    x: Tensor  # (B, L, D), output of a branch
    residual: Tensor | None  # (B, L, D), residual stream; None for zeros
    weight: Tensor  # (D,), scale of the norm
    bias: Tensor | None  # (D,), shift of the norm
    drop_path_scale: Tensor | None  # (B,), float32, factor of each sequence of x; None for 1
    layer: bool  # take the mean off first, as a layer norm does
    eps: float  # added to the mean square
    out_dtype: torch.dtype  # of the normed tokens

    @property
    def is_sum_itself(self) -> bool:
        """True if the residual sum equals x. The operator then returns (0,) in its place."""
        return self.residual is None and self.drop_path_scale is None and self.x.dtype == torch.float32


class AddNormSaved(NamedTuple):
    """Tensors and options of the backward pass, apart from the gradients of the outputs."""

    total: Tensor  # (B, L, D), float32, residual sum
    rstd: Tensor  # (B, L), float32, 1 / deviation of each token
    mean: Tensor  # (B, L), float32, mean of each token; (0,) without `layer`
    weight: Tensor  # (D,)
    bias: Tensor | None  # (D,)
    drop_path_scale: Tensor | None  # (B,), float32
    layer: bool
    x_dtype: torch.dtype  # of the gradient of x
    residual_dtype: torch.dtype | None  # of the gradient of residual; None where there is none
