"""Launch the native bidirectional scan: allocate, and hand over sizes, strides and addresses."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ssmpretrain.kernels.native import library

_ABSENT_TENSOR = (0, 0, 0, 0, 0)
_ABSENT_DIRECTION = (0, 0, 0, 0, 0, 0, 0)
_A = 5  # place of A in a direction
_DT_PROJ = 3


def forward(
    xz: Tensor, parameters: Sequence[Tensor], divide_output: bool, keep_states: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, x_dbl and, if asked, every CHUNK-th state for `backward` (otherwise nothing, (0,)).

    Args:
        xz: (B, L, 2E), float32 or bfloat16.
        parameters: The seven tensors of each direction, float32.
        divide_output: Halve the sum of two directions.
        keep_states: Keep what the backward pass needs.
    """
    batch, tokens, width = xz.shape
    parameters = [p.contiguous() for p in parameters]
    out = xz.new_empty(batch, tokens, width // 2)
    x_dbl = torch.empty(x_dbl_shape(xz, parameters), dtype=torch.float32)
    states = torch.empty(states_shape(xz, parameters) if keep_states else (0,), dtype=torch.float32)
    arguments = (
        *_sizes(xz, parameters, divide_output),
        *_halves(xz),
        *_fields(out),
        *(x_dbl.data_ptr(), states.data_ptr() if keep_states else 0),
        *_directions(parameters),
    )
    _library().call("bidirectional_scan", arguments)
    return out, x_dbl, states


def backward(
    dout: Tensor, x_dbl: Tensor, states: Tensor, xz: Tensor, parameters: Sequence[Tensor], divide_output: bool
) -> list[Tensor]:
    """Return the gradients of xz (in its dtype, contiguous) and of every parameter (float32)."""
    parameters = [p.contiguous() for p in parameters]
    dxz = torch.empty_like(xz, memory_format=torch.contiguous_format)
    gradients = [torch.empty_like(p) for p in parameters]
    arguments = (
        *_sizes(xz, parameters, divide_output),
        *_halves(xz),
        *_ABSENT_TENSOR,
        *(x_dbl.data_ptr(), states.data_ptr()),
        *_directions(parameters),
        *_fields(dout),
        *_halves(dxz),
        *_directions(gradients),
    )
    _library().call("bidirectional_scan_backward", arguments)
    return [dxz, *gradients]


def x_dbl_shape(xz: Tensor, parameters: Sequence[Tensor]) -> tuple[int, int, int, int]:
    """Return the shape of dt, B and C side by side, (directions, B, L, R + 2N padded to a multiple of 16)."""
    columns = parameters[_DT_PROJ].shape[1] + 2 * parameters[_A].shape[1]
    return len(parameters) // 7, xz.shape[0], xz.shape[1], -(-columns // 16) * 16


def states_shape(xz: Tensor, parameters: Sequence[Tensor]) -> tuple[int]:
    """Return (how many floats,) that hold the states between chunks, channels padded to 16."""
    batch, tokens, width = xz.shape
    padded = -(-width // 32) * 16
    return (len(parameters) // 7 * batch * -(-tokens // library.CHUNK) * parameters[_A].shape[1] * padded,)


def _library() -> library.NativeLibrary:
    native = library.load()
    assert native is not None, "the choice in api.py comes first"
    return native


def _sizes(xz: Tensor, parameters: Sequence[Tensor], divide_output: bool) -> tuple[int, ...]:
    batch, tokens, width = xz.shape
    state, rank, taps = parameters[_A].shape[1], parameters[_DT_PROJ].shape[1], parameters[0].shape[1]
    return (
        *(library.threads(), batch, width // 2, tokens, state, rank, taps, len(parameters) // 7, library.CHUNK),
        *(divide_output, xz.dtype == torch.bfloat16),
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
    addresses = tuple(t.data_ptr() for t in tensors)
    return addresses if len(tensors) == 14 else (*addresses, *_ABSENT_DIRECTION)
