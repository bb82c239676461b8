"""Launch residual sum and norm on the GPU: allocate outputs, divide the work, start the kernels."""

import torch
import triton
from torch import Tensor

from ssmpretrain.kernels.add_norm import triton_kernels
from ssmpretrain.kernels.add_norm.inputs import AddNormInputs, AddNormSaved
from ssmpretrain.kernels.gpu.launch import launch
from ssmpretrain.kernels.layouts import with_dense_rows

TILE = 1024  # elements, where D leaves the choice: 8 for each thread of 4 warps, 16 bytes of bfloat16 at a time
MAX_PROGRAMS = 528  # of the backward pass: 4 on each multiprocessor of an H100, about what its registers hold


def forward(inputs: AddNormInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the normed tokens and the residual sum, 1 / deviation and mean of `AddNormSaved`.

    If the residual sum is x, (0,) is returned in its place.
    """
    x, residual, weight, bias, scale, layer, eps, out_dtype = inputs
    keep_total = not inputs.is_sum_itself
    batch, tokens, channels = x.shape
    x = with_dense_rows(x)
    residual = None if residual is None else with_dense_rows(residual)
    normed = x.new_empty(x.shape, dtype=out_dtype)
    total = x.new_empty(x.shape if keep_total else (0,), dtype=torch.float32)
    rstd = x.new_empty((batch, tokens), dtype=torch.float32)
    mean = x.new_empty((batch, tokens) if layer else (0,), dtype=torch.float32)
    rows, columns, num_warps = _tile(tokens, channels)
    tiles = triton.cdiv(tokens, rows)
    launch(
        triton_kernels.add_norm,
        (batch * tiles,),
        num_warps,
        x=x,
        residual=residual,
        weight=weight.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        scale=scale,
        normed=normed,
        total=total if keep_total else None,
        rstd=rstd,
        mean=mean,
        tokens=tokens,
        channels=channels,
        eps=eps,
        x_b=x.stride(0),
        x_l=x.stride(1),
        residual_b=0 if residual is None else residual.stride(0),
        residual_l=0 if residual is None else residual.stride(1),
        tiles=tiles,
        LAYER=layer,
        ROWS=rows,
        COLUMNS=columns,
    )
    return normed, total, rstd, mean


def backward(
    dnormed: Tensor, dtotal: Tensor | None, saved: AddNormSaved
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Return the gradients of x, residual, weight and bias.

    Args:
        dnormed: Gradient of the normed tokens, (B, L, D).
        dtotal: Gradient of the residual sum, (B, L, D), or None for zeros.
        saved: What `forward` computed, and its options.
    """
    total, rstd, mean, weight, bias, scale, layer, x_dtype, residual_dtype = saved
    batch, tokens, channels = total.shape
    total = total.contiguous()
    dnormed = with_dense_rows(dnormed)
    dtotal = None if dtotal is None else with_dense_rows(dtotal)
    dx = total.new_empty(total.shape, dtype=x_dtype)
    dresidual = None if residual_dtype is None else total.new_empty(total.shape, dtype=residual_dtype)
    rows, columns, num_warps = _tile(tokens, channels)
    tiles = triton.cdiv(tokens, rows)
    programs = min(batch * tiles, MAX_PROGRAMS)
    partial = total.new_empty((programs, 1 if bias is None else 2, channels))
    launch(
        triton_kernels.add_norm_backward,
        (programs,),
        num_warps,
        dnormed=dnormed,
        dtotal=dtotal,
        total=total,
        rstd=rstd,
        mean=mean,
        weight=weight.contiguous(),
        scale=scale,
        dx=dx,
        dresidual=dresidual,
        partial=partial,
        tokens=tokens,
        channels=channels,
        dnormed_b=dnormed.stride(0),
        dnormed_l=dnormed.stride(1),
        dtotal_b=0 if dtotal is None else dtotal.stride(0),
        dtotal_l=0 if dtotal is None else dtotal.stride(1),
        tiles=tiles,
        all_tiles=batch * tiles,
        programs=programs,
        LAYER=layer,
        BIAS=bias is not None,
        ROWS=rows,
        COLUMNS=columns,
    )
    dweight = partial[:, 0].sum(0).to(weight.dtype)
    return dx, dresidual, dweight, None if bias is None else partial[:, 1].sum(0).to(bias.dtype)


def _tile(tokens: int, channels: int) -> tuple[int, int, int]:
    """Return rows and columns of a tile, and the warps of its program."""
    columns = triton.next_power_of_2(channels)
    rows = min(max(TILE // columns, 1), triton.next_power_of_2(tokens))
    return rows, columns, min(max(rows * columns // 256, 1), 16)
