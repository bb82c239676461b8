"""The operators of residual sum and norm in Triton: schemas, shapes, gradients and FLOPs."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ssmpretrain.kernels.add_norm.inputs import AddNormInputs, AddNormSaved
from ssmpretrain.kernels.transforms import register_gradient_op


@torch.library.custom_op("ssmpretrain::add_norm", mutates_args=())
def add_norm_op(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    layer: bool,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ssmpretrain.kernels.add_norm import triton  # imported here: Triton need not be installed

    return triton.forward(AddNormInputs(x, residual, weight, bias, scale, layer, eps, out_dtype))


@add_norm_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = AddNormInputs(*arguments)
    x, rows = inputs.x, inputs.x.shape[:2]
    return (
        x.new_empty(x.shape, dtype=inputs.out_dtype),
        x.new_empty((0,) if inputs.is_sum_itself else x.shape, dtype=torch.float32),
        x.new_empty(rows, dtype=torch.float32),
        x.new_empty(rows if inputs.layer else (0,), dtype=torch.float32),
    )


@torch.library.custom_op("ssmpretrain::add_norm_backward", mutates_args=())
def add_norm_backward_op(
    dnormed: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    rstd: Tensor,
    mean: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    layer: bool,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ssmpretrain.kernels.add_norm import triton

    saved = AddNormSaved(total, rstd, mean, weight, bias, scale, layer, x_dtype, residual_dtype)
    dx, dresidual, dweight, dbias = triton.backward(dnormed, dtotal, saved)
    return (
        dx,
        total.new_empty(0) if dresidual is None else dresidual,
        dweight,
        total.new_empty(0) if dbias is None else dbias,
    )


@add_norm_backward_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, _, *fields = arguments
    total, _, _, weight, bias, _, _, x_dtype, residual_dtype = AddNormSaved(*fields)
    return (
        total.new_empty(total.shape, dtype=x_dtype),
        total.new_empty(0) if residual_dtype is None else total.new_empty(total.shape, dtype=residual_dtype),
        weight.new_empty(weight.shape),
        total.new_empty(0) if bias is None else bias.new_empty(bias.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    given = AddNormInputs(*inputs)
    _, total, rstd, mean = output
    ctx.set_materialize_grads(False)
    ctx.has_total = not given.is_sum_itself
    ctx.options = (given.layer, given.x.dtype, None if given.residual is None else given.residual.dtype)
    total = total if ctx.has_total else given.x
    ctx.save_for_backward(total, rstd, mean, given.weight, given.bias, given.drop_path_scale)


def _backward(ctx: Any, dnormed: Tensor | None, dtotal: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    saved = AddNormSaved(*ctx.saved_tensors, *ctx.options)
    if dnormed is None:
        dnormed = torch.zeros_like(saved.total)
    dtotal = dtotal if ctx.has_total else None
    dx, dresidual, dweight, dbias = add_norm_backward_op(dnormed, dtotal, *saved)
    absent = (None, None, None, None)
    return (
        dx,
        None if saved.residual_dtype is None else dresidual,
        dweight,
        None if saved.bias is None else dbias,
        *absent,
    )


add_norm_op.register_autograd(_backward, setup_context=_setup_context)
register_gradient_op("add_norm", add_norm_backward_op)


@register_flop_formula(torch.ops.ssmpretrain.add_norm)
def _flops(x_shape: torch.Size, *_: Any, **__: Any) -> int:
    return 6 * math.prod(x_shape)  # scale, add, square, sum, times 1 / deviation, times weight


@register_flop_formula(torch.ops.ssmpretrain.add_norm_backward)
def _backward_flops(dnormed_shape: torch.Size, *_: Any, **__: Any) -> int:
    # normalise, g, g n and its sum, minus n mean, times 1 / deviation, plus dtotal, times scale, dweight
    return 11 * math.prod(dnormed_shape)
