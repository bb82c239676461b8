"""Launch the native SSD: allocate outputs and pass sizes, strides and addresses."""

import struct

import torch
from torch import Tensor

from ssmpretrain.kernels.native import library
from ssmpretrain.kernels.ssd.inputs import SSDInputs

_ABSENT_ROWS = (0, 0, 0, 0, 0)
_ABSENT_STEPS = (0, 0, 0, 0, 0)


def forward(inputs: SSDInputs, keep_states: bool) -> tuple[Tensor, Tensor]:
    """Return y, (B, L, H, P), contiguous, and what `backward` needs besides the inputs, or nothing, (0,)."""
    inputs = _readable(inputs)
    y = inputs.x.new_empty(inputs.x.shape, dtype=torch.float32 if inputs.wide else inputs.x.dtype)
    states = torch.empty(states_shape(inputs), dtype=torch.float32)
    library.call("ssd", _arguments(inputs, y, states))
    return y, states if keep_states else states.new_empty(0)


def backward(dy: Tensor, states: Tensor, inputs: SSDInputs) -> list[Tensor]:
    """Return the gradients of the tensors that are present, in the order of `inputs`, contiguous, in their dtypes."""
    inputs = _readable(inputs)
    tensors = inputs[:8]
    gradients = [None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]
    dx, dB, dC, dD, ddt, dA, ddt_backward, dA_backward = gradients
    dy = _with_last_stride_1(dy)
    arguments = (
        *_arguments(inputs, None, states),
        *_rows(dy),
        *(number for gradient in (dx, dB, dC) for number in _rows(gradient)),
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


def _readable(inputs: SSDInputs) -> SSDInputs:
    """Return the inputs with the layouts that the library reads. The caller holds them until the call is over."""
    x, B, C = (_with_last_stride_1(rows) for rows in (inputs.x, inputs.B, inputs.C))
    D, A, A_backward = (None if t is None else t.contiguous() for t in (inputs.D, inputs.A, inputs.A_backward))
    return inputs._replace(x=x, B=B, C=C, D=D, A=A, A_backward=A_backward)


def _with_last_stride_1(rows: Tensor) -> Tensor:
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _arguments(inputs: SSDInputs, y: Tensor | None, states: Tensor) -> tuple[int, ...]:
    """Return the fields of the struct that both passes read."""
    scale = struct.unpack("<i", struct.pack("<f", inputs.scale))[0]
    return (
        *(*inputs.sizes, _chunk(inputs), scale),
        *(number for rows in (inputs.x, inputs.B, inputs.C, y) for number in _rows(rows)),
        0 if inputs.D is None else inputs.D.data_ptr(),
        *_steps(inputs.dt, inputs.A),
        *_steps(inputs.dt_backward, inputs.A_backward),
        states.data_ptr() if states.numel() else 0,
    )


def _rows(rows: Tensor | None) -> tuple[int, ...]:
    """Return address, dtype and strides of rows (B, L, H, width)."""
    if rows is None:
        return _ABSENT_ROWS
    return (rows.data_ptr(), int(rows.dtype == torch.bfloat16), *rows.stride()[:3])


def _steps(dt: Tensor | None, A: Tensor | None) -> tuple[int, ...]:
    """Return address and strides of step sizes (B, L, H), and the address of A."""
    return _ABSENT_STEPS if dt is None or A is None else (dt.data_ptr(), *dt.stride(), A.data_ptr())
