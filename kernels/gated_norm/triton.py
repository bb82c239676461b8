"""Launch the gated norm on the GPU: allocate outputs, divide the work, start the kernels."""

from typing import Any

import torch
import triton
from torch import Tensor

from ssmpretrain.kernels.gated_norm import triton_kernels
from ssmpretrain.kernels.gated_norm.inputs import GatedNormInputs
from ssmpretrain.kernels.gpu.launch import launch
from ssmpretrain.kernels.layouts import with_dense_rows

TILE = 1024  # elements, where the size of a group leaves the choice: 8 for each thread of 4 warps
MAX_PROGRAMS = 528  # of the backward pass: 4 on each multiprocessor of an H100, about what its registers hold


def forward(inputs: GatedNormInputs) -> Tensor:
    """Return the normed tokens, (B, L, D), contiguous, in x's dtype."""
    out = inputs.x.new_empty(inputs.x.shape)
    all_tiles, num_warps, arguments = _arguments(inputs)
    launch(triton_kernels.gated_norm, (all_tiles * inputs.groups,), num_warps, out=out, **arguments)
    return out


def backward(dout: Tensor, inputs: GatedNormInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, z and weight, contiguous, in their dtypes."""
    x, z, weight, _, groups = inputs
    dx, dz = x.new_empty(x.shape), z.new_empty(z.shape)
    all_tiles, num_warps, arguments = _arguments(inputs)
    programs = min(all_tiles, triton.cdiv(MAX_PROGRAMS, groups))  # of each group
    partial = x.new_empty((programs, x.shape[2]), dtype=torch.float32)
    dout = with_dense_rows(dout)
    launch(
        triton_kernels.gated_norm_backward,
        (programs * groups,),
        num_warps,
        dout=dout,
        dx=dx,
        dz=dz,
        partial=partial,
        dout_b=dout.stride(0),
        dout_l=dout.stride(1),
        all_tiles=all_tiles,
        programs=programs,
        **arguments,
    )
    return dx, dz, partial.sum(0).to(weight.dtype)


def _arguments(inputs: GatedNormInputs) -> tuple[int, int, dict[str, Any]]:
    """Return the number of tiles of a group, the warps of a program, and the arguments of both kernels."""
    x, z, weight, eps, groups = inputs
    x, z = with_dense_rows(x), with_dense_rows(z)
    batch, tokens, channels = x.shape
    columns = triton.next_power_of_2(channels // groups)
    rows = min(max(TILE // columns, 1), triton.next_power_of_2(tokens))
    tiles = triton.cdiv(tokens, rows)
    arguments = {
        "x": x,
        "z": z,
        "weight": weight.contiguous(),
        "tokens": tokens,
        "size": channels // groups,
        "groups": groups,
        "eps": eps,
        "x_b": x.stride(0),
        "x_l": x.stride(1),
        "z_b": z.stride(0),
        "z_l": z.stride(1),
        "tiles": tiles,
        "ROWS": rows,
        "COLUMNS": columns,
    }
    return batch * tiles, min(max(rows * columns // 256, 1), 16), arguments
