"""Launch the native selective scan: allocate, and hand over sizes, strides and addresses."""

import torch
from torch import Tensor

from ssmpretrain.kernels.native import library

_ABSENT = (0, 0, 0, 0, 0)


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the last state and, if asked, every CHUNK-th state for `backward` (otherwise nothing, (0,))."""
    A, D, delta_bias = A.contiguous(), _contiguous(D), _contiguous(delta_bias)
    out = torch.empty_like(u)
    last = A.new_empty(u.shape[0], *A.shape)
    states = u.new_empty(states_shape(u, A, B) if keep_states else (0,), dtype=torch.float32)
    arguments = (
        *_sizes(u, A, B, reverse, delta_softplus),
        *_fields(u),
        *_fields(delta),
        *_fields(z),
        *_fields(out),
        *(A.data_ptr(), _address(D), _address(delta_bias)),
        *_row_fields(B),
        *_row_fields(C),
        *(states.data_ptr() if keep_states else 0, last.data_ptr()),
    )
    _library().call("selective_scan", arguments)
    return out, last, states


def backward(
    dout: Tensor,
    dlast: Tensor | None,
    states: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of u, delta, A, B, C, D, z and delta_bias; of what is absent, (0,)."""
    A, D, delta_bias, dlast = A.contiguous(), _contiguous(D), _contiguous(delta_bias), _contiguous(dlast)
    du, ddelta = torch.empty_like(u), torch.empty_like(delta)
    dz = u.new_empty(0) if z is None else torch.empty_like(z)
    dA = torch.empty_like(A)
    dB, dC = (rows.new_empty(rows.shape, dtype=torch.float32) for rows in (B, C))
    dD = A.new_empty(0 if D is None else D.shape)
    dbias = A.new_empty(0 if delta_bias is None else delta_bias.shape)
    arguments = (
        *_sizes(u, A, B, reverse, delta_softplus),
        *_fields(u),
        *_fields(delta),
        *_fields(z),
        *_ABSENT,
        *(A.data_ptr(), _address(D), _address(delta_bias)),
        *_row_fields(B),
        *_row_fields(C),
        *(states.data_ptr(), 0),
        *_fields(dout),
        _address(dlast),
        *_fields(du),
        *_fields(ddelta),
        *(_ABSENT if z is None else _fields(dz)),
        *(dA.data_ptr(), 0 if D is None else dD.data_ptr(), 0 if delta_bias is None else dbias.data_ptr()),
        *(dB.data_ptr(), dC.data_ptr()),
    )
    _library().call("selective_scan_backward", arguments)
    return du, ddelta, dA, dB.to(B.dtype), dC.to(C.dtype), dD, dz, dbias


def states_shape(u: Tensor, A: Tensor, B: Tensor) -> tuple[int]:
    """Return (how many floats,) that hold the states between chunks, channels of each group padded to 16."""
    batch, channels, tokens = u.shape
    groups = B.shape[1]
    padded = groups * (-(-(channels // groups) // 16) * 16)
    return (batch * -(-tokens // library.CHUNK) * A.shape[1] * padded,)


def _library() -> library.NativeLibrary:
    native = library.load()
    assert native is not None, "the choice in api.py comes first"
    return native


def _sizes(u: Tensor, A: Tensor, B: Tensor, reverse: bool, delta_softplus: bool) -> tuple[int, ...]:
    batch, channels, tokens = u.shape
    return (
        *(library.threads(), batch, channels, tokens, A.shape[1], B.shape[1]),
        *(reverse, delta_softplus, library.CHUNK),
    )


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _fields(tensor: Tensor | None) -> tuple[int, ...]:
    """Describe a (B, E, L) tensor of float32 or bfloat16."""
    if tensor is None:
        return _ABSENT
    return (tensor.data_ptr(), tensor.dtype == torch.bfloat16, *tensor.stride())


def _row_fields(rows: Tensor) -> tuple[int, ...]:
    """Describe a (B, G, N, L) tensor of float32 or bfloat16."""
    return (rows.data_ptr(), rows.dtype == torch.bfloat16, *rows.stride())
