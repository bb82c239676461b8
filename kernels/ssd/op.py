"""The operators of the SSD: schemas, shapes, gradients and FLOPs."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ssmpretrain.kernels.dispatch import without_autocast
from ssmpretrain.kernels.ssd import cpu
from ssmpretrain.kernels.ssd.inputs import SSDInputs
from ssmpretrain.kernels.transforms import check_kept, register_gradient_op

_TENSORS = 8  # the first fields of SSDInputs


def _kernels(impl: str) -> ModuleType:
    """Return the module that computes. Triton need not be installed, so it is imported when it is needed."""
    if impl == "native":
        return cpu
    from ssmpretrain.kernels.ssd import triton

    return triton


def run_kernel(inputs: SSDInputs, keep_states: bool, impl: str) -> Tensor:
    """Call the operator with the dtypes that its kernels read; the native library gets float16 as float32."""
    dtype = inputs.x.dtype
    widen = impl == "native" and dtype == torch.float16
    rows = [t.float() if widen else t for t in (inputs.x, inputs.B, inputs.C)]
    rest = (inputs.D, inputs.dt, inputs.A, inputs.dt_backward, inputs.A_backward)
    in_float32 = [None if t is None else t.float() for t in rest]
    y: Tensor = ssd_op(*rows, *in_float32, *inputs[_TENSORS:], keep_states, impl)[0]
    return y.half() if widen and not inputs.wide else y


@torch.library.custom_op("ssmpretrain::ssd", mutates_args=())
def ssd_op(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt: Tensor | None,
    A: Tensor | None,
    dt_backward: Tensor | None,
    A_backward: Tensor | None,
    scale: float,
    chunk: int | None,
    wide: bool,
    keep_states: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    inputs = SSDInputs(x, B, C, D, dt, A, dt_backward, A_backward, scale, chunk, wide)
    with without_autocast(x.device.type):
        return _kernels(impl).forward(inputs, keep_states)  # type: ignore[no-any-return]


@ssd_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    *fields, keep_states, impl = arguments
    inputs = SSDInputs(*fields)
    y = inputs.x.new_empty(inputs.x.shape, dtype=torch.float32 if inputs.wide else inputs.x.dtype)
    states = inputs.x.new_empty(_kernels(impl).states_shape(inputs) if keep_states else (0,), dtype=torch.float32)
    return y, states


@torch.library.custom_op("ssmpretrain::ssd_backward", mutates_args=())
def ssd_backward_op(
    dy: Tensor,
    states: Tensor,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt: Tensor | None,
    A: Tensor | None,
    dt_backward: Tensor | None,
    A_backward: Tensor | None,
    scale: float,
    chunk: int | None,
    wide: bool,
    impl: str,
) -> list[Tensor]:
    inputs = SSDInputs(x, B, C, D, dt, A, dt_backward, A_backward, scale, chunk, wide)
    with without_autocast(x.device.type):
        return _kernels(impl).backward(dy, states, inputs)  # type: ignore[no-any-return]


@ssd_backward_op.register_fake
def _(dy: Tensor, states: Tensor, *arguments: Any) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in arguments[:_TENSORS] if t is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *fields, ctx.kept, ctx.impl = inputs
    ctx.settings = fields[_TENSORS:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *fields[:_TENSORS])


def _backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    check_kept("ssd", ctx.kept)
    states, *tensors = ctx.saved_tensors
    gradients: Sequence[Tensor | None] = [None] * _TENSORS
    if dy is not None:
        found = iter(ssd_backward_op(dy, states, *tensors, *ctx.settings, ctx.impl))
        gradients = [None if t is None else next(found) for t in tensors]
    return (*gradients, None, None, None, None, None)


ssd_op.register_autograd(_backward, setup_context=_setup_context)
register_gradient_op("ssd", ssd_backward_op)


def _work(x_shape: torch.Size, B_shape: torch.Size, directions: int, chunk: int | None) -> int:
    """Return the FLOPs of the matrix products: C B, its product with x, states out of and into every chunk."""
    batch, tokens, heads, channels = x_shape
    groups, state = B_shape[2:]
    steps = min(chunk or 64, tokens)
    between = 4 * state * channels * directions * heads if tokens > steps else 0
    return batch * tokens * (2 * steps * (groups * state + heads * channels) + between)


def _directions(dt_shape: torch.Size | None, dt_backward_shape: torch.Size | None) -> int:
    return (dt_shape is not None) + (dt_backward_shape is not None)


@register_flop_formula(torch.ops.ssmpretrain.ssd)
def _flops(x: Any, B: Any, C: Any, D: Any, dt: Any, A: Any, back: Any, A_back: Any, scale: Any, chunk: Any, *_: Any,
           **__: Any) -> int:  # fmt: skip
    return _work(x, B, _directions(dt, back), chunk)


@register_flop_formula(torch.ops.ssmpretrain.ssd_backward)
def _backward_flops(dy: Any, states: Any, x: Any, B: Any, C: Any, D: Any, dt: Any, A: Any, back: Any, A_back: Any,
                    scale: Any, chunk: Any, *_: Any, **__: Any) -> int:  # fmt: skip
    # C B and the states are computed again; each product's backward is two products
    return 3 * _work(x, B, _directions(dt, back), chunk)
