"""Launch the native selective scan: allocate outputs and pass sizes, strides and addresses."""

import torch
from torch import Tensor

from ssmpretrain.kernels.native import library
from ssmpretrain.kernels.selective_scan.inputs import ScanInputs

_ABSENT = (0, 0, 0, 0, 0)


def forward(inputs: ScanInputs, keep_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the last state and, if asked, every CHUNK-th state for `backward` (otherwise nothing, (0,))."""
    inputs = _with_contiguous_parameters(inputs)
    u, A = inputs.u, inputs.A
    out = torch.empty_like(u)
    last = A.new_empty(u.shape[0], *A.shape)
    states = u.new_empty(states_shape(inputs) if keep_states else (0,), dtype=torch.float32)
    arguments = (
        *_sizes(inputs),
        *_fields(u),
        *_fields(inputs.delta),
        *_fields(inputs.z),
        *_fields(out),
        *_parameter_addresses(inputs),
        *_row_fields(inputs.B),
        *_row_fields(inputs.C),
        *(states.data_ptr() if keep_states else 0, last.data_ptr()),
    )
    library.call("selective_scan", arguments)
    return out, last, states


def backward(
    dout: Tensor, dlast: Tensor | None, states: Tensor, inputs: ScanInputs
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the tensors in `ScanInputs`, in their order; of what is absent, (0,)."""
    inputs = _with_contiguous_parameters(inputs)
    u, delta, A, B, C, D, z, delta_bias, *_ = inputs
    dlast = None if dlast is None else dlast.contiguous()
    du, ddelta = torch.empty_like(u), torch.empty_like(delta)
    dz = u.new_empty(0) if z is None else torch.empty_like(z)
    dA = torch.empty_like(A)
    dB, dC = (rows.new_empty(rows.shape, dtype=torch.float32) for rows in (B, C))
    dD = A.new_empty(0 if D is None else D.shape)
    dbias = A.new_empty(0 if delta_bias is None else delta_bias.shape)
    arguments = (
        *_sizes(inputs),
        *_fields(u),
        *_fields(delta),
        *_fields(z),
        *_ABSENT,
        *_parameter_addresses(inputs),
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
    library.call("selective_scan_backward", arguments)
    return du, ddelta, dA, dB.to(B.dtype), dC.to(C.dtype), dD, dz, dbias


def states_shape(inputs: ScanInputs) -> tuple[int]:
    """Return the number of floats, as a shape, of all states between chunks; channels of a group padded to 16."""
    batch, channels, tokens = inputs.u.shape
    groups = inputs.B.shape[1]
    padded = groups * (-(-(channels // groups) // 16) * 16)
    return (batch * -(-tokens // library.CHUNK) * inputs.A.shape[1] * padded,)


def _with_contiguous_parameters(inputs: ScanInputs) -> ScanInputs:
    D, delta_bias = (None if p is None else p.contiguous() for p in (inputs.D, inputs.delta_bias))
    return inputs._replace(A=inputs.A.contiguous(), D=D, delta_bias=delta_bias)


def _sizes(inputs: ScanInputs) -> tuple[int, ...]:
    batch, channels, tokens = inputs.u.shape
    return (
        *(batch, channels, tokens, inputs.A.shape[1], inputs.B.shape[1]),
        *(inputs.reverse, inputs.delta_softplus, library.CHUNK),
    )


def _parameter_addresses(inputs: ScanInputs) -> tuple[int, int, int]:
    return inputs.A.data_ptr(), _address(inputs.D), _address(inputs.delta_bias)


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
