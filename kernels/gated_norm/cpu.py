"""Launch the native gated norm: allocate outputs and pass sizes, strides and addresses."""

import torch
from torch import Tensor

from ssmpretrain.kernels.gated_norm.inputs import GatedNormInputs
from ssmpretrain.kernels.layouts import with_dense_rows
from ssmpretrain.kernels.native import library
from ssmpretrain.kernels.native.fields import float_bits, head_rows


def forward(inputs: GatedNormInputs) -> Tensor:
    """Return the normed tokens, (B, L, D), contiguous, in x's dtype."""
    inputs = _readable(inputs)
    out = inputs.x.new_empty(inputs.x.shape)
    library.call("gated_norm", _arguments(inputs, out))
    return out


def backward(dout: Tensor, inputs: GatedNormInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, z and weight, contiguous, in their dtypes."""
    inputs = _readable(inputs)
    dout = with_dense_rows(dout)
    dx, dz, dweight = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs[:3])
    arguments = (*_arguments(inputs, None), *head_rows(dout), *head_rows(dx), *head_rows(dz), dweight.data_ptr())
    library.call("gated_norm_backward", arguments)
    return dx, dz, dweight


def _readable(inputs: GatedNormInputs) -> GatedNormInputs:
    """Return the inputs with the layouts that the library reads. The caller holds them until the call is over."""
    x, z = (with_dense_rows(rows) for rows in (inputs.x, inputs.z))
    return inputs._replace(x=x, z=z, weight=inputs.weight.contiguous())


def _arguments(inputs: GatedNormInputs, out: Tensor | None) -> tuple[int, ...]:
    """Return the fields of the struct that both passes read."""
    x, z, weight, eps, groups = inputs
    return (*x.shape, groups, float_bits(eps), *head_rows(x), *head_rows(z), *head_rows(out), weight.data_ptr())
