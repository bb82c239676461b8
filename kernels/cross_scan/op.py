"""The operators of the cross scan: schemas, shapes, gradients and FLOPs.

The routes are one string, separated by spaces, because the schema of an operator has no lists of strings.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ssmpretrain.kernels.cross_scan import cpu
from ssmpretrain.kernels.cross_scan.inputs import CrossScanInputs
from ssmpretrain.kernels.dispatch import without_autocast
from ssmpretrain.kernels.transforms import check_kept, register_gradient_op


def _kernels(impl: str, inputs: CrossScanInputs) -> ModuleType:
    """Return the module that computes. Triton need not be installed, so it is imported when it is needed."""
    if impl == "native":
        return cpu
    if inputs.A.shape[2] == 1:
        from ssmpretrain.kernels.cross_scan import triton_one_state

        return triton_one_state
    from ssmpretrain.kernels.cross_scan import triton

    return triton


def run_kernel(inputs: CrossScanInputs, keep_states: bool, impl: str) -> Tensor:
    """Call the operator with parameters in float32; return y in float32.

    The native library reads float32 and bfloat16. A float16 x is widened for it, and the projections are rounded to
    float16, as they are where x stays float16.
    """
    x, x_proj, dt_proj, dt_bias, A, D, routes = inputs
    if impl == "native" and x.dtype == torch.float16:
        x, x_proj, dt_proj = x.float(), x_proj.half(), dt_proj.half()
    parameters = (p.float() for p in (x_proj, dt_proj, dt_bias, A, D))
    y: Tensor = cross_selective_scan_op(x, *parameters, " ".join(routes), keep_states, impl)[0]
    return y


@torch.library.custom_op("ssmpretrain::cross_selective_scan", mutates_args=())
def cross_selective_scan_op(
    x: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    routes: str,
    keep_states: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = CrossScanInputs(x, x_proj, dt_proj, dt_bias, A, D, tuple(routes.split()))
    with without_autocast(x.device.type):
        return _kernels(impl, inputs).forward(inputs, keep_states)  # type: ignore[no-any-return]


@cross_selective_scan_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, x_proj, dt_proj, dt_bias, A, D, routes, keep_states, impl = arguments
    inputs = CrossScanInputs(x, x_proj, dt_proj, dt_bias, A, D, tuple(routes.split()))
    kernels = _kernels(impl, inputs)
    x_dbl = x.new_empty(kernels.x_dbl_shape(inputs), dtype=torch.float32)
    states = x.new_empty(kernels.states_shape(inputs) if keep_states else (0,), dtype=torch.float32)
    return torch.empty_like(x, dtype=torch.float32), x_dbl, states


@torch.library.custom_op("ssmpretrain::cross_selective_scan_backward", mutates_args=())
def cross_selective_scan_backward_op(
    dy: Tensor,
    x_dbl: Tensor,
    states: Tensor,
    x: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    routes: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = CrossScanInputs(x, x_proj, dt_proj, dt_bias, A, D, tuple(routes.split()))
    with without_autocast(x.device.type):
        dx, dx_proj, ddt_proj, ddt_bias, dA, dD = _kernels(impl, inputs).backward(dy, x_dbl, states, inputs)
    return dx, dx_proj, ddt_proj, ddt_bias, dA, dD


@cross_selective_scan_backward_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    _, _, _, x, *parameters, _, _ = arguments
    return torch.empty_like(x), *(p.new_empty(p.shape) for p in parameters)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.routes, ctx.kept, ctx.impl = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], *tensors)


def _backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    check_kept("cross_selective_scan", ctx.kept)
    if dy is None:
        return (None,) * 9
    gradients = cross_selective_scan_backward_op(dy, *ctx.saved_tensors, ctx.routes, ctx.impl)
    return (*gradients, None, None, None)


cross_selective_scan_op.register_autograd(_backward, setup_context=_setup_context)
register_gradient_op("cross_selective_scan", cross_selective_scan_backward_op)


def _work(
    x_shape: torch.Size, x_proj_shape: torch.Size, dt_proj_shape: torch.Size, A_shape: torch.Size
) -> tuple[int, int, int]:
    """Return the FLOPs of x_proj and dt_proj, and the number of state updates, over all routes."""
    batch, _, height, width = x_shape
    tokens = batch * height * width
    return 2 * tokens * x_proj_shape.numel(), 2 * tokens * dt_proj_shape.numel(), tokens * A_shape.numel()


@register_flop_formula(torch.ops.ssmpretrain.cross_selective_scan)
def _flops(
    x_shape: torch.Size,
    x_proj_shape: torch.Size,
    dt_proj_shape: torch.Size,
    dt_bias_shape: torch.Size,
    A_shape: torch.Size,
    *_: Any,
    **__: Any,
) -> int:
    x_proj, dt_proj, updates = _work(x_shape, x_proj_shape, dt_proj_shape, A_shape)
    return x_proj + dt_proj + 9 * updates  # 9 per state as in selective_scan


@register_flop_formula(torch.ops.ssmpretrain.cross_selective_scan_backward)
def _backward_flops(
    dy_shape: torch.Size,
    x_dbl_shape: torch.Size,
    states_shape: torch.Size,
    x_shape: torch.Size,
    x_proj_shape: torch.Size,
    dt_proj_shape: torch.Size,
    dt_bias_shape: torch.Size,
    A_shape: torch.Size,
    *_: Any,
    **__: Any,
) -> int:
    x_proj, dt_proj, updates = _work(x_shape, x_proj_shape, dt_proj_shape, A_shape)
    # a product's backward is two products; the step size and the scan are also computed again
    return 2 * x_proj + 3 * dt_proj + (9 + 14) * updates
