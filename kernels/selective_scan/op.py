"""The operators of the selective scan: schemas, shapes, gradients and FLOPs."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ssmpretrain.kernels.selective_scan import cpu
from ssmpretrain.kernels.selective_scan.inputs import ScanInputs
from ssmpretrain.kernels.transforms import check_kept, register_gradient_op


def _kernels(impl: str) -> ModuleType:
    """Return the module that computes. Triton need not be installed, so it is imported when it is needed."""
    if impl == "native":
        return cpu
    from ssmpretrain.kernels.selective_scan import triton

    return triton


def run_kernel(inputs: ScanInputs, keep_states: bool, impl: str) -> tuple[Tensor, Tensor]:
    """Call the operator with the dtypes and shapes that its kernels read; return y and the last state.

    B and C get an axis of groups, D and the bias become float32. The native library reads float32 and bfloat16; float16
    is widened for it.
    """
    dtype = inputs.u.dtype
    if impl == "native":
        inputs = ScanInputs(*(_widen_half(t) for t in inputs))
    if inputs.B.ndim == 3:
        inputs = inputs._replace(B=inputs.B.unsqueeze(1), C=inputs.C.unsqueeze(1))
    D, delta_bias = (None if p is None else p.float() for p in (inputs.D, inputs.delta_bias))
    y, last, _ = selective_scan_op(*inputs._replace(D=D, delta_bias=delta_bias), keep_states, impl)
    return y.to(dtype), last


def _widen_half(value: Any) -> Any:
    """Return a float16 tensor as float32, anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.float16 else value


@torch.library.custom_op("ssmpretrain::selective_scan", mutates_args=())
def selective_scan_op(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    keep_states: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
    return _kernels(impl).forward(inputs, keep_states)  # type: ignore[no-any-return]


@selective_scan_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *fields, keep_states, impl = arguments
    inputs = ScanInputs(*fields)
    u, A = inputs.u, inputs.A
    states = u.new_empty(_kernels(impl).states_shape(inputs) if keep_states else (0,), dtype=torch.float32)
    return torch.empty_like(u), A.new_empty(u.shape[0], *A.shape), states


@torch.library.custom_op("ssmpretrain::selective_scan_backward", mutates_args=())
def selective_scan_backward_op(
    dout: Tensor,
    dlast: Tensor | None,
    states: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
    return _kernels(impl).backward(dout, dlast, states, inputs)  # type: ignore[no-any-return]


@selective_scan_backward_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    _, _, _, *fields, _ = arguments
    u, delta, A, B, C, D, z, delta_bias, _, _ = ScanInputs(*fields)
    return (
        torch.empty_like(u),
        torch.empty_like(delta),
        A.new_empty(A.shape),
        B.new_empty(B.shape),
        C.new_empty(C.shape),
        A.new_empty(0 if D is None else D.shape),
        u.new_empty(0) if z is None else torch.empty_like(z),
        A.new_empty(0 if delta_bias is None else delta_bias.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, softplus, reverse, ctx.kept, ctx.impl = inputs
    ctx.flags = (softplus, reverse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2], *tensors)


def _backward(ctx: Any, dout: Tensor | None, dlast: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    check_kept("selective_scan", ctx.kept)
    states, *tensors = ctx.saved_tensors
    inputs = ScanInputs(*tensors, *ctx.flags)
    if dout is None:
        dout = inputs.u.new_zeros(()).expand(inputs.u.shape)
    gradients = selective_scan_backward_op(dout, dlast, states, *inputs, ctx.impl)
    of_tensors = (None if t is None else gradient for t, gradient in zip(tensors, gradients, strict=True))
    return (*of_tensors, None, None, None, None)


selective_scan_op.register_autograd(_backward, setup_context=_setup_context)
register_gradient_op("selective_scan", selective_scan_backward_op)


@register_flop_formula(torch.ops.ssmpretrain.selective_scan)
def _flops(u_shape: torch.Size, delta_shape: torch.Size, A_shape: torch.Size, *_: Any, **__: Any) -> int:
    # per state: dt A, exp, dt u (shared, counted as 1), times B, times h, add, times C, add, D or gate: 9 as in VMamba
    return 9 * u_shape.numel() * A_shape[1]


@register_flop_formula(torch.ops.ssmpretrain.selective_scan_backward)
def _backward_flops(
    dout_shape: torch.Size,
    dlast_shape: torch.Size | None,
    states_shape: torch.Size,
    u_shape: torch.Size,
    delta_shape: torch.Size,
    A_shape: torch.Size,
    *_: Any,
    **__: Any,
) -> int:
    # the forward once more, then per state: 6 multiply-adds (g, ddtx, dB, dC, ddelta, dA) and 2 products
    return (9 + 14) * u_shape.numel() * A_shape[1]
