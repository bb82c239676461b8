"""The operators of the gated norm: schemas, shapes, gradients and FLOPs."""

import math
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ssmpretrain.kernels.gated_norm import cpu
from ssmpretrain.kernels.gated_norm.inputs import GatedNormInputs
from ssmpretrain.kernels.transforms import register_gradient_op


def _kernels(impl: str) -> ModuleType:
    """Return the module that computes. Triton need not be installed, so it is imported when it is needed."""
    if impl == "native":
        return cpu
    from ssmpretrain.kernels.gated_norm import triton

    return triton


def run_kernel(inputs: GatedNormInputs, impl: str) -> Tensor:
    """Call the operator with the dtypes that its kernels read; the native library gets float16 as float32."""
    x, z, weight, eps, groups = inputs
    widen = impl == "native" and x.dtype == torch.float16
    rows = (x.float(), z.float()) if widen else (x, z)
    out = cast(Tensor, gated_norm_op(*rows, weight.float(), eps, groups, impl))
    return out.half() if widen else out


@torch.library.custom_op("ssmpretrain::gated_norm", mutates_args=())
def gated_norm_op(x: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int, impl: str) -> Tensor:
    return cast(Tensor, _kernels(impl).forward(GatedNormInputs(x, z, weight, eps, groups)))


@gated_norm_op.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("ssmpretrain::gated_norm_backward", mutates_args=())
def gated_norm_backward_op(
    dout: Tensor, x: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    found = _kernels(impl).backward(dout, GatedNormInputs(x, z, weight, eps, groups))
    return cast(tuple[Tensor, Tensor, Tensor], found)


@gated_norm_backward_op.register_fake
def _(dout: Tensor, x: Tensor, z: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), z.new_empty(z.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, ctx.groups, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    gradients = gated_norm_backward_op(dout, *ctx.saved_tensors, ctx.eps, ctx.groups, ctx.impl)
    return (*gradients, None, None, None)


gated_norm_op.register_autograd(_backward, setup_context=_setup_context)
register_gradient_op("gated_rms_norm", gated_norm_backward_op)


@register_flop_formula(torch.ops.ssmpretrain.gated_norm)
def _flops(x_shape: torch.Size, *_: Any, **__: Any) -> int:
    return 9 * math.prod(x_shape)  # SiLU 4, gate, square, sum, times 1 / deviation, times weight


@register_flop_formula(torch.ops.ssmpretrain.gated_norm_backward)
def _backward_flops(dout_shape: torch.Size, *_: Any, **__: Any) -> int:
    # SiLU 4, gate, square, sum, g, g h and its sum, minus h mean, times 1 / deviation, dx, slope 4, dz 2, dweight 2
    return 20 * math.prod(dout_shape)
