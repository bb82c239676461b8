"""What PyTorch must know about the selective scan: its operators, shapes, gradients and FLOPs."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ssmpretrain.kernels.selective_scan import cpu
from ssmpretrain.kernels.transforms import check_kept, register_gradient_op


def _kernels(impl: str) -> ModuleType:
    """Return what computes: "native" or "triton", which need not be installed and is imported when it is wanted."""
    if impl == "native":
        return cpu
    from ssmpretrain.kernels.selective_scan import triton

    return triton


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
    return _kernels(impl).forward(  # type: ignore[no-any-return]
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, keep_states
    )


@selective_scan_op.register_fake
def _(
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
    states = u.new_empty(_kernels(impl).states_shape(u, A, B) if keep_states else (0,), dtype=torch.float32)
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
    return _kernels(impl).backward(  # type: ignore[no-any-return]
        dout, dlast, states, u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse
    )


@selective_scan_backward_op.register_fake
def _(
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
    *tensors, ctx.delta_softplus, ctx.reverse, ctx.kept, ctx.impl = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2], *tensors)


def _backward(ctx: Any, dout: Tensor | None, dlast: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    check_kept("selective_scan", ctx.kept)
    states, u, delta, A, B, C, D, z, delta_bias = ctx.saved_tensors
    if dout is None:
        dout = u.new_zeros(()).expand(u.shape)
    du, ddelta, dA, dB, dC, dD, dz, dbias = selective_scan_backward_op(
        dout, dlast, states, u, delta, A, B, C, D, z, delta_bias, ctx.delta_softplus, ctx.reverse, ctx.impl
    )
    absent = (None, None, None, None)
    return (
        *(du, ddelta, dA, dB, dC),
        None if D is None else dD,
        None if z is None else dz,
        None if delta_bias is None else dbias,
        *absent,
    )


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
