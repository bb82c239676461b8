"""Launch the native gated norm: allocate outputs and pass sizes, strides and addresses."""

import struct

import torch
from torch import Tensor

from ssmpretrain.kernels.gated_norm.inputs import GatedNormInputs
from ssmpretrain.kernels.native import library

_ABSENT = (0, 0, 0, 0, 0)


def forward(inputs: GatedNormInputs) -> Tensor:
    """Return the normed tokens, (B, L, D), contiguous, in x's dtype."""
    inputs = _readable(inputs)
    out = inputs.x.new_empty(inputs.x.shape)
    library.call("gated_norm", _arguments(inputs, out))
    return out


def backward(dout: Tensor, inputs: GatedNormInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, z and weight, contiguous, in their dtypes."""
    inputs = _readable(inputs)
    dout = _with_last_stride_1(dout)
    dx, dz, dweight = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs[:3])
    arguments = (*_arguments(inputs, None), *_rows(dout), *_rows(dx), *_rows(dz), dweight.data_ptr())
    library.call("gated_norm_backward", arguments)
    return dx, dz, dweight


def _readable(inputs: GatedNormInputs) -> GatedNormInputs:
    """Return the inputs with the layouts that the library reads. The caller holds them until the call is over."""
    x, z = (_with_last_stride_1(rows) for rows in (inputs.x, inputs.z))
    return inputs._replace(x=x, z=z, weight=inputs.weight.contiguous())


def _with_last_stride_1(rows: Tensor) -> Tensor:
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _arguments(inputs: GatedNormInputs, out: Tensor | None) -> tuple[int, ...]:
    """Return the fields of the struct that both passes read."""
    x, z, weight, eps, groups = inputs
    bits = struct.unpack("<i", struct.pack("<f", eps))[0]
    return (*x.shape, groups, bits, *_rows(x), *_rows(z), *_rows(out), weight.data_ptr())


def _rows(rows: Tensor | None) -> tuple[int, ...]:
    """Return address, dtype and strides of rows (B, L, D), which have one head."""
    if rows is None:
        return _ABSENT
    return (rows.data_ptr(), int(rows.dtype == torch.bfloat16), *rows.stride()[:2], 0)
