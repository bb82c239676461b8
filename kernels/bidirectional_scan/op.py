"""The operators of the bidirectional scan: schemas, shapes, gradients and FLOPs."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ssmpretrain.kernels.bidirectional_scan import cpu
from ssmpretrain.kernels.bidirectional_scan.inputs import BidirectionalInputs, ScanDirection
from ssmpretrain.kernels.dispatch import without_autocast
from ssmpretrain.kernels.transforms import check_kept, register_gradient_op


def _kernels(impl: str) -> ModuleType:
    """Return the module that computes. Triton need not be installed, so it is imported when it is needed."""
    if impl == "native":
        return cpu
    from ssmpretrain.kernels.bidirectional_scan import triton

    return triton


def _directions(parameters: Sequence[Any]) -> tuple[ScanDirection, ...]:
    """Cut the operator's list of parameters, or of their shapes, into directions."""
    count = len(ScanDirection._fields)
    return tuple(ScanDirection(*parameters[i : i + count]) for i in range(0, len(parameters), count))


def run_kernel(inputs: BidirectionalInputs, keep_states: bool, impl: str) -> Tensor:
    """Call the operator with parameters in float32.

    The native library reads float32 and bfloat16. A float16 xz is widened for it, and the projections are rounded to
    float16, as they are where xz stays float16.
    """
    xz, directions, divide_output = inputs
    widen = impl == "native" and xz.dtype == torch.float16
    if widen:
        directions = tuple(d._replace(x_proj=d.x_proj.half(), dt_proj=d.dt_proj.half()) for d in directions)
    parameters = [p.float() for direction in directions for p in direction]
    xz = xz.float() if widen else xz
    out: Tensor = bidirectional_scan_op(xz, parameters, divide_output, keep_states, impl)[0]
    return out.half() if widen else out


@torch.library.custom_op("ssmpretrain::bidirectional_scan", mutates_args=())
def bidirectional_scan_op(
    xz: Tensor, parameters: Sequence[Tensor], divide_output: bool, keep_states: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = BidirectionalInputs(xz, _directions(parameters), divide_output)
    with without_autocast(xz.device.type):
        return _kernels(impl).forward(inputs, keep_states)  # type: ignore[no-any-return]


@bidirectional_scan_op.register_fake
def _(
    xz: Tensor, parameters: Sequence[Tensor], divide_output: bool, keep_states: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = BidirectionalInputs(xz, _directions(parameters), divide_output)
    out = xz.new_empty(*xz.shape[:2], xz.shape[2] // 2)
    x_dbl = xz.new_empty(_kernels(impl).x_dbl_shape(inputs), dtype=torch.float32)
    kept = _kernels(impl).states_shape(inputs) if keep_states else (0,)
    states = xz.new_empty(kept, dtype=torch.float32)
    return out, x_dbl, states


@torch.library.custom_op("ssmpretrain::bidirectional_scan_backward", mutates_args=())
def bidirectional_scan_backward_op(
    dout: Tensor,
    x_dbl: Tensor,
    states: Tensor,
    xz: Tensor,
    parameters: Sequence[Tensor],
    divide_output: bool,
    impl: str,
) -> list[Tensor]:
    inputs = BidirectionalInputs(xz, _directions(parameters), divide_output)
    with without_autocast(xz.device.type):
        return _kernels(impl).backward(dout, x_dbl, states, inputs)  # type: ignore[no-any-return]


@bidirectional_scan_backward_op.register_fake
def _(
    dout: Tensor,
    x_dbl: Tensor,
    states: Tensor,
    xz: Tensor,
    parameters: Sequence[Tensor],
    divide_output: bool,
    impl: str,
) -> list[Tensor]:
    return [xz.new_empty(xz.shape), *(p.new_empty(p.shape) for p in parameters)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    xz, parameters, ctx.divide_output, ctx.kept, ctx.impl = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], xz, *parameters)


def _backward(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Tensor | None, list[Tensor | None], None, None, None]:
    check_kept("bidirectional_scan", ctx.kept)
    x_dbl, states, xz, *parameters = ctx.saved_tensors
    if dout is None:
        return None, [None] * len(parameters), None, None, None
    dxz, *gradients = bidirectional_scan_backward_op(dout, x_dbl, states, xz, parameters, ctx.divide_output, ctx.impl)
    return dxz, gradients, None, None, None


bidirectional_scan_op.register_autograd(_backward, setup_context=_setup_context)
register_gradient_op("bidirectional_scan", bidirectional_scan_backward_op)


def _work(xz_shape: torch.Size, parameters_shape: Sequence[torch.Size]) -> tuple[int, int, int, int]:
    """Return the FLOPs of convolution, x_proj and dt_proj, and the number of state updates, over all directions."""
    directions = _directions(parameters_shape)
    tokens = xz_shape[0] * xz_shape[1] * len(directions)
    conv_weight, _, x_proj, dt_proj, _, A, _ = directions[0]
    return (
        2 * tokens * conv_weight.numel(),
        2 * tokens * x_proj.numel(),
        2 * tokens * dt_proj.numel(),
        tokens * A.numel(),
    )


@register_flop_formula(torch.ops.ssmpretrain.bidirectional_scan)
def _flops(xz_shape: torch.Size, parameters_shape: Sequence[torch.Size], *_: Any, **__: Any) -> int:
    conv, x_proj, dt_proj, updates = _work(xz_shape, parameters_shape)
    return conv + x_proj + dt_proj + 9 * updates  # 9 per state as in selective_scan


@register_flop_formula(torch.ops.ssmpretrain.bidirectional_scan_backward)
def _backward_flops(
    dout_shape: torch.Size,
    x_dbl_shape: torch.Size,
    states_shape: torch.Size,
    xz_shape: torch.Size,
    parameters_shape: Sequence[torch.Size],
    *_: Any,
    **__: Any,
) -> int:
    conv, x_proj, dt_proj, updates = _work(xz_shape, parameters_shape)
    # a product's backward is two products; convolution, step size and scan are also computed again
    return 3 * conv + 2 * x_proj + 3 * dt_proj + (9 + 14) * updates
