"""The operators of the convolution: schemas, shapes, gradients and FLOPs."""

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ssmpretrain.kernels.causal_conv1d import cpu
from ssmpretrain.kernels.transforms import register_gradient_op


def _kernels(impl: str) -> ModuleType:
    """Return the module that computes. Triton need not be installed, so it is imported when it is needed."""
    if impl == "native":
        return cpu
    from ssmpretrain.kernels.causal_conv1d import triton

    return triton


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, impl: str, *, reverse: bool, centred: bool, silu: bool
) -> Tensor:
    """Call the operator with a dtype that its kernels read; the native library gets float16 as float32."""
    widen = impl == "native" and x.dtype == torch.float16
    y: Tensor = causal_conv1d_op(x.float() if widen else x, weight, bias, reverse, centred, silu, impl)
    return y.half() if widen else y


@torch.library.custom_op("ssmpretrain::causal_conv1d", mutates_args=())
def causal_conv1d_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, centred: bool, silu: bool, impl: str
) -> Tensor:
    return _kernels(impl).forward(  # type: ignore[no-any-return]
        x, weight, bias, reverse=reverse, centred=centred, silu=silu
    )


@causal_conv1d_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, centred: bool, silu: bool, impl: str) -> Tensor:
    return x.new_empty_strided((weight.shape[0], *x.shape), (x.numel(), *torch.empty_like(x).stride()))


@torch.library.custom_op("ssmpretrain::causal_conv1d_backward", mutates_args=())
def causal_conv1d_backward_op(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, centred: bool, silu: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = _kernels(impl).backward(dout, x, weight, bias, reverse=reverse, centred=centred, silu=silu)
    return dx, dweight, weight.new_empty(0) if dbias is None else dbias


@causal_conv1d_backward_op.register_fake
def _(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, centred: bool, silu: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = weight.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return torch.empty_like(x), weight.new_empty(weight.shape), dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.reverse, ctx.centred, ctx.silu, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = causal_conv1d_backward_op(
        *(dout, x, weight, bias, ctx.reverse, ctx.centred, ctx.silu, ctx.impl)
    )
    return dx, dweight, None if bias is None else dbias, None, None, None, None


causal_conv1d_op.register_autograd(_backward, setup_context=_setup_context)
register_gradient_op("causal_conv1d", causal_conv1d_backward_op)


@register_flop_formula(torch.ops.ssmpretrain.causal_conv1d)
def _flops(x_shape: torch.Size, weight_shape: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * weight_shape[0] * math.prod(x_shape) * weight_shape[2]  # as F.conv1d counts; the SiLU is free there too


@register_flop_formula(torch.ops.ssmpretrain.causal_conv1d_backward)
def _backward_flops(dout_shape: torch.Size, x_shape: torch.Size, weight_shape: torch.Size, *_: Any, **__: Any) -> int:
    return 3 * _flops(x_shape, weight_shape)  # once more forward, then the gradients of x and of weight
