"""The inputs of `gated_rms_norm`, named and described once for all its implementations."""

from typing import NamedTuple

from torch import Tensor


class GatedNormInputs(NamedTuple):
    """Tensors and settings of one call. B batch, L tokens, D channels."""

    x: Tensor  # (B, L, D)
    z: Tensor  # (B, L, D), gate before its SiLU, dtype of x
    weight: Tensor  # (D,), float32
    eps: float  # added to the mean square
    groups: int  # each D / groups neighbouring channels have a norm of their own
