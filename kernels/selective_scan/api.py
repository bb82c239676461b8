"""The contract of `selective_scan` and the choice of implementation."""

# B batch, E channels, L tokens, N state, G groups of channels that share B and C

from typing import Literal, overload

import torch
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.kernels.dispatch import Impl, check_dtypes_and_devices, choose_implementation, keeps_states
from ssmpretrain.kernels.selective_scan.op import selective_scan_op
from ssmpretrain.kernels.selective_scan.plain import PLAIN_SCANS


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: Literal[False] = False,
    *,
    reverse: bool = False,
    impl: Impl = "auto",
) -> Tensor: ...


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    reverse: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]: ...


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    reverse: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan `h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t`, `y_t = C_t . h_t + D u_t`, gated by `silu(z_t)`.

    The signature and layout of mamba-ssm's `selective_scan_fn`. Arithmetic and state are float32 whatever the inputs
    are; every input is differentiable and receives its gradient in its own dtype. u, delta, z, B and C may have any
    strides and each its own dtype (float32, bfloat16 or float16). With a float64 u every input is float64, and so is
    the arithmetic: that is for checks and always runs the reference.

    Memory: for the backward pass the kernels keep their inputs and 4 E N / 64 bytes of states per token.

    Layout: on the GPU threads hold neighbouring channels, so (B, L, E) memory, whose transpose u, delta and z are, is
    the fast one; where L is contiguous, as in mamba-ssm, they are copied first.

    Args:
        u: Input, (B, E, L).
        delta: Step size before bias and softplus, (B, E, L).
        A: State matrix, diagonal, (E, N), float32; negative for a decaying state.
        B: Input projection, (B, N, L), or (B, G, N, L) where channel e uses row e // (E / G).
        C: Output projection, shaped like B.
        D: Skip weight, (E,), or None for no skip.
        z: Gate before its SiLU, (B, E, L), or None for no gate.
        delta_bias: Added to delta before the softplus, (E,).
        delta_softplus: Use softplus(delta + delta_bias) as the step, which keeps it positive.
        return_last_state: Also return the state after the last step.
        reverse: Scan from the last position to the first, the backward direction of Vim.
        impl: "auto" takes the Triton kernel on CUDA, the native kernel on the CPU (eager chunks where it cannot be
            built) and the reference in float64 and on every other device; "triton", "cpu" and "reference" name one.
            With TRITON_INTERPRET=1, "triton" runs the kernel in Triton's interpreter, on CPU tensors.

    Returns:
        y, (B, E, L), in u's dtype and, where u is dense, with u's strides. With return_last_state, also the state
        after the last step (after position 0 when reverse), (B, E, N), float32; it is differentiable too.

    Raises:
        ValueError: If a shape, dtype or device does not fit, L is 0, or impl is unknown or cannot run here.

    Source: Gu & Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv:2312.00752), alg. 2.
    """
    _check(u, delta, A, B, C, D, z, delta_bias)
    implementation = choose_implementation("selective_scan", u, impl, (delta, A, B, C, D, z, delta_bias))
    if implementation in ("native", "triton"):
        return _operator(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, reverse, implementation
        )
    return PLAIN_SCANS[implementation](
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, reverse=reverse
    )


def _operator(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    return_last_state: bool,
    reverse: bool,
    impl: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """Call the operator: B and C with their groups spelled out, D and the bias in float32."""
    dtype = u.dtype
    if impl == "native":
        u, delta, B, C = (_widen_half(t) for t in (u, delta, B, C))
        z = None if z is None else _widen_half(z)
    if B.ndim == 3:
        B, C = B.unsqueeze(1), C.unsqueeze(1)
    D = None if D is None else D.float()
    delta_bias = None if delta_bias is None else delta_bias.float()
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    out, last, _ = selective_scan_op(*inputs, delta_softplus, reverse, keeps_states(inputs), impl)
    out = out.to(dtype)
    return (out, last) if return_last_state else out


def _widen_half(tensor: Tensor) -> Tensor:
    """Return float16 as float32, which the native library reads; float32 and bfloat16 as they are."""
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    if u.ndim != 3 or 0 in u.shape:
        raise UserError(f"selective_scan: u is (B, E, L), none of them 0; got {tuple(u.shape)}")
    batch, channels, tokens = u.shape
    if A.ndim != 2 or A.shape[0] != channels or A.shape[1] == 0:
        raise UserError(f"selective_scan: A is (E, N) with u's E = {channels} and N at least 1; got {tuple(A.shape)}")
    state = A.shape[1]
    for name, tensor in (("delta", delta), ("z", z)):
        if tensor is not None and tensor.shape != u.shape:
            raise UserError(f"selective_scan: {name} is (B, E, L) like u, {tuple(u.shape)}; got {tuple(tensor.shape)}")
    for name, tensor in (("D", D), ("delta_bias", delta_bias)):
        if tensor is not None and tensor.shape != (channels,):
            raise UserError(f"selective_scan: {name} is (E,) with u's E = {channels}; got {tuple(tensor.shape)}")
    for name, rows in (("B", B), ("C", C)):
        if rows.ndim not in (3, 4) or (rows.shape[0], *rows.shape[-2:]) != (batch, state, tokens):
            raise UserError(
                f"selective_scan: {name} is (B, N, L) or (B, G, N, L) with B, N, L = {batch}, {state}, {tokens}; "
                f"got {tuple(rows.shape)}"
            )
        if rows.ndim == 4 and (rows.shape[1] == 0 or channels % rows.shape[1] != 0):
            raise UserError(
                f"selective_scan: the number of groups G of {name} divides u's E = {channels}; "
                f"got G = {rows.shape[1]} in {tuple(rows.shape)}"
            )
    if B.shape != C.shape:
        raise UserError(f"selective_scan: B and C share one shape; got B {tuple(B.shape)} and C {tuple(C.shape)}")
    named = (
        ("u", u),
        ("delta", delta),
        ("A", A),
        ("B", B),
        ("C", C),
        ("D", D),
        ("z", z),
        ("delta_bias", delta_bias),
    )
    check_dtypes_and_devices("selective_scan", named)
