"""Launch the native bidirectional scan: allocate outputs and pass sizes, strides and addresses."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ssmpretrain.kernels.bidirectional_scan.inputs import BidirectionalInputs, ScanDirection
from ssmpretrain.kernels.native import library

_ABSENT_TENSOR = (0, 0, 0, 0, 0)
_ABSENT_DIRECTION = (0,) * len(ScanDirection._fields)


def forward(inputs: BidirectionalInputs, keep_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, x_dbl and, if asked, every CHUNK-th state for `backward` (otherwise nothing, (0,))."""
    xz = inputs.xz
    batch, tokens, width = xz.shape
    parameters = [p.contiguous() for direction in inputs.directions for p in direction]
    out = xz.new_empty(batch, tokens, width // 2)
    x_dbl = torch.empty(x_dbl_shape(inputs), dtype=torch.float32)
    states = torch.empty(states_shape(inputs) if keep_states else (0,), dtype=torch.float32)
    arguments = (
        *_sizes(inputs),
        *_halves(xz),
        *_fields(out),
        *(x_dbl.data_ptr(), states.data_ptr() if keep_states else 0),
        *_directions(parameters),
    )
    library.call("bidirectional_scan", arguments)
    return out, x_dbl, states


def backward(dout: Tensor, x_dbl: Tensor, states: Tensor, inputs: BidirectionalInputs) -> list[Tensor]:
    """Return the gradients of xz (in its dtype, contiguous) and of every parameter (float32)."""
    xz = inputs.xz
    parameters = [p.contiguous() for direction in inputs.directions for p in direction]
    dxz = torch.empty_like(xz, memory_format=torch.contiguous_format)
    gradients = [torch.empty_like(p) for p in parameters]
    arguments = (
        *_sizes(inputs),
        *_halves(xz),
        *_ABSENT_TENSOR,
        *(x_dbl.data_ptr(), states.data_ptr()),
        *_directions(parameters),
        *_fields(dout),
        *_halves(dxz),
        *_directions(gradients),
    )
    library.call("bidirectional_scan_backward", arguments)
    return [dxz, *gradients]


def x_dbl_shape(inputs: BidirectionalInputs) -> tuple[int, int, int, int]:
    """Return the shape of dt, B and C side by side, (directions, B, L, R + 2N padded to a multiple of 16)."""
    columns, _ = inputs.directions[0].x_proj.shape
    return len(inputs.directions), inputs.xz.shape[0], inputs.xz.shape[1], -(-columns // 16) * 16


def states_shape(inputs: BidirectionalInputs) -> tuple[int]:
    """Return the number of floats, as a shape, of all states between chunks; channels padded to 16."""
    batch, tokens, width = inputs.xz.shape
    padded = -(-width // 32) * 16
    state = inputs.directions[0].A.shape[1]
    return (len(inputs.directions) * batch * -(-tokens // library.CHUNK) * state * padded,)


def _sizes(inputs: BidirectionalInputs) -> tuple[int, ...]:
    batch, tokens, width = inputs.xz.shape
    first = inputs.directions[0]
    state, rank, taps = first.A.shape[1], first.dt_proj.shape[1], first.conv_weight.shape[1]
    return (
        *(batch, width // 2, tokens, state, rank, taps, len(inputs.directions), library.CHUNK),
        *(inputs.divide_output, inputs.xz.dtype == torch.bfloat16),
    )


def _fields(tensor: Tensor) -> tuple[int, ...]:
    """Describe a (B, L, E) tensor of float32 or bfloat16 in the order B, E, L."""
    batch, tokens, channels = tensor.stride()
    return (tensor.data_ptr(), tensor.dtype == torch.bfloat16, batch, channels, tokens)


def _halves(xz: Tensor) -> tuple[int, ...]:
    """Describe x and z, which lie side by side in xz."""
    address, is_bf16, batch, channels, tokens = _fields(xz)
    offset = xz.shape[-1] // 2 * channels * xz.element_size()
    return (address, is_bf16, batch, channels, tokens, address + offset, is_bf16, batch, channels, tokens)


def _directions(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Return the addresses of both directions' tensors, zeros for a direction that is absent."""
    addresses = tuple(t.data_ptr() for t in tensors)
    return addresses if len(tensors) == 2 * len(_ABSENT_DIRECTION) else (*addresses, *_ABSENT_DIRECTION)
