"""What PyTorch must know about residual sum and norm in Triton: its operators, shapes, gradients and FLOPs."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ssmpretrain.kernels.transforms import register_gradient_op


def is_sum_itself(x: Tensor, residual: Tensor | None, scale: Tensor | None) -> bool:
    """Return whether the residual sum would be x over again; the operator then returns (0,) in its place."""
    return residual is None and scale is None and x.dtype == torch.float32


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
    from ssmpretrain.kernels.add_norm import triton as gpu  # only here: Triton need not be installed

    keep_total = not is_sum_itself(x, residual, scale)
    return gpu.forward(
        x, residual, weight, bias, scale, layer=layer, eps=eps, out_dtype=out_dtype, keep_total=keep_total
    )


@add_norm_op.register_fake
def _(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    layer: bool,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.shape[:2]
    return (
        x.new_empty(x.shape, dtype=out_dtype),
        x.new_empty((0,) if is_sum_itself(x, residual, scale) else x.shape, dtype=torch.float32),
        x.new_empty(rows, dtype=torch.float32),
        x.new_empty(rows if layer else (0,), dtype=torch.float32),
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
    from ssmpretrain.kernels.add_norm import triton as gpu

    dx, dresidual, dweight, dbias = gpu.backward(
        *(dnormed, dtotal, total, rstd, mean, weight, bias, scale),
        layer=layer,
        x_dtype=x_dtype,
        residual_dtype=residual_dtype,
    )
    return (
        dx,
        total.new_empty(0) if dresidual is None else dresidual,
        dweight,
        total.new_empty(0) if dbias is None else dbias,
    )


@add_norm_backward_op.register_fake
def _(
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
    return (
        total.new_empty(total.shape, dtype=x_dtype),
        total.new_empty(0) if residual_dtype is None else total.new_empty(total.shape, dtype=residual_dtype),
        weight.new_empty(weight.shape),
        total.new_empty(0) if bias is None else bias.new_empty(bias.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, bias, scale, ctx.layer, _, _ = inputs
    _, total, rstd, mean = output
    ctx.x_dtype = x.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.set_materialize_grads(False)
    ctx.has_total = not is_sum_itself(x, residual, scale)
    total = total if ctx.has_total else x
    ctx.save_for_backward(total, rstd, mean, weight, bias, scale)


def _backward(ctx: Any, dnormed: Tensor | None, dtotal: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    total, rstd, mean, weight, bias, scale = ctx.saved_tensors
    if dnormed is None:
        dnormed = torch.zeros_like(total)
    dx, dresidual, dweight, dbias = add_norm_backward_op(
        *(dnormed, dtotal if ctx.has_total else None, total, rstd, mean, weight, bias, scale),
        ctx.layer,
        ctx.x_dtype,
        ctx.residual_dtype,
    )
    absent = (None, None, None, None)
    return (
        dx,
        None if ctx.residual_dtype is None else dresidual,
        dweight,
        None if bias is None else dbias,
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
