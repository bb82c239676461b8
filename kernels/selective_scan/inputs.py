"""The inputs of `selective_scan`, named and described once for all its implementations."""

from typing import NamedTuple

from torch import Tensor


class ScanInputs(NamedTuple):
    """Tensors and flags of one selective scan, in the order of the operator's schema.

    B batch, E channels, L tokens, N states, G groups of channels that share B and C. u, delta, z, B and C have any
    strides and each its own dtype: float32, bfloat16 or float16. With a float64 u every tensor is float64.
    """

    u: Tensor  # (B, E, L), input
    delta: Tensor  # (B, E, L), step size before bias and softplus
    A: Tensor  # (E, N), float32, diagonal of the state matrix
    B: Tensor  # (B, G, N, L), input projection; plain PyTorch also takes (B, N, L)
    C: Tensor  # like B, output projection
    D: Tensor | None = None  # (E,), skip weight; float32 in a kernel
    z: Tensor | None = None  # (B, E, L), gate before its SiLU
    delta_bias: Tensor | None = None  # (E,), added to delta before the softplus; float32 in a kernel
    delta_softplus: bool = False  # use softplus(delta + delta_bias) as the step
    reverse: bool = False  # scan from the last token to the first
