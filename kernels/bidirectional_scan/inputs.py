"""The inputs of `bidirectional_scan`, named and described once for all its implementations."""

from typing import NamedTuple

from torch import Tensor


class ScanDirection(NamedTuple):
    """The parameters of one direction, float32; autocast's rule for mixed precision is in `bidirectional_scan`.

    E channels, N states, R rank of the step size, W width of the convolution.
    """

    conv_weight: Tensor  # (E, W), depthwise; the last column meets the current token
    conv_bias: Tensor  # (E,)
    x_proj: Tensor  # (R + 2N, E), rows in the order delta, B, C
    dt_proj: Tensor  # (E, R)
    dt_bias: Tensor  # (E,), added before the softplus
    A: Tensor  # (E, N), float32, already -exp(A_log)
    D: Tensor  # (E,), skip weight


class BidirectionalInputs(NamedTuple):
    """Tensors and flags of one call. B batch, L tokens, E channels."""

    xz: Tensor  # (B, L, 2E), input and gate side by side; float32, bfloat16 or float16
    directions: tuple[ScanDirection, ...]  # forward, and backward unless the block has one direction
    divide_output: bool  # halve the sum of two directions
