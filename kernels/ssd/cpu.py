"""Launch the native SSD: allocate outputs and pass sizes, strides and addresses."""

import torch
from torch import Tensor

from ssmpretrain.kernels.layouts import with_dense_rows
from ssmpretrain.kernels.native import library
from ssmpretrain.kernels.native.fields import float_bits, head_rows
from ssmpretrain.kernels.ssd.inputs import SSDInputs

_ABSENT_STEPS = (0, 0, 0, 0, 0)


def forward(inputs: SSDInputs, keep_states: bool) -> tuple[Tensor, Tensor]:
    """Return y, (B, L, H, P), contiguous, and what `backward` needs besides the inputs, or nothing, (0,)."""
    inputs = inputs.readable()  # held until the call is over
    y = inputs.x.new_empty(inputs.x.shape, dtype=torch.float32 if inputs.wide else inputs.x.dtype)
    states = torch.empty(states_shape(inputs), dtype=torch.float32)
    library.call("ssd", _arguments(inputs, y, states))
    return y, states if keep_states else states.new_empty(0)


def backward(dy: Tensor, states: Tensor, inputs: SSDInputs) -> list[Tensor]:
    """Return the gradients of the tensors that are present, in the order of `inputs`, contiguous, in their dtypes."""
    inputs = inputs.readable()  # held until the call is over
    tensors = inputs[:8]
    gradients = [None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]
    dx, dB, dC, dD, ddt, dA, ddt_backward, dA_backward = gradients
    dy = with_dense_rows(dy)
    arguments = (
        *_arguments(inputs, None, states),
        *head_rows(dy),
        *(number for gradient in (dx, dB, dC) for number in head_rows(gradient)),
        *(0 if t is None else t.data_ptr() for t in (dD, ddt, ddt_backward, dA, dA_backward)),
    )
    library.call("ssd_backward", arguments)
    return [gradient for gradient in gradients if gradient is not None]


def states_shape(inputs: SSDInputs) -> tuple[int, ...]:
    """Return the shape of the states that enter each chunk, (directions, B, H, chunks, N, P rounded up to 16)."""
    batch, tokens, heads, channels, _, state = inputs.sizes
    chunk = _chunk(inputs)
    if tokens <= chunk:
        return (0,)
    return len(inputs.directions), batch, heads, -(-tokens // chunk), state, -(-channels // 16) * 16


def _chunk(inputs: SSDInputs) -> int:
    """Return the tokens of a chunk. One chunk costs fewer products than several and their states up to some length."""
    if inputs.chunk is not None:
        return inputs.chunk
    tokens, state = inputs.x.shape[1], inputs.B.shape[3]
    alone = min(256, 64 + 2 * len(inputs.directions) * state)
    return -(-tokens // 16) * 16 if tokens <= alone else 64


def _arguments(inputs: SSDInputs, y: Tensor | None, states: Tensor) -> tuple[int, ...]:
    """Return the fields of the struct that both passes read."""
    return (
        *(*inputs.sizes, _chunk(inputs), float_bits(inputs.scale)),
        *(number for rows in (inputs.x, inputs.B, inputs.C, y) for number in head_rows(rows)),
        0 if inputs.D is None else inputs.D.data_ptr(),
        *_steps(inputs.dt, inputs.A),
        *_steps(inputs.dt_backward, inputs.A_backward),
        states.data_ptr() if states.numel() else 0,
    )


def _steps(dt: Tensor | None, A: Tensor | None) -> tuple[int, ...]:
    """Return address and strides of step sizes (B, L, H), and the address of A."""
    return _ABSENT_STEPS if dt is None or A is None else (dt.data_ptr(), *dt.stride(), A.data_ptr())
