"""Launch the native SSD: allocate outputs and pass sizes, strides and addresses."""

from torch import Tensor

from ssmpretrain.kernels.ssd.inputs import SSDInputs


def forward(inputs: SSDInputs, keep_states: bool) -> tuple[Tensor, Tensor]:
    """Return y, (B, L, H, P), contiguous, and what `backward` needs besides the inputs, or nothing, (0,)."""
    raise NotImplementedError


def backward(dy: Tensor, states: Tensor, inputs: SSDInputs) -> list[Tensor]:
    """Return the gradients of the tensors that are present, in the order of `inputs`, contiguous, in their dtypes."""
    raise NotImplementedError


def states_shape(inputs: SSDInputs) -> tuple[int, ...]:
    """Return the shape of what `forward` keeps for `backward`."""
    return (0,)
