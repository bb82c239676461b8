"""The contract of `selective_scan` and the choice of implementation."""

# B batch, E channels, L tokens, N state, G groups of channels that share B and C

from typing import Literal, overload

from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.kernels.dispatch import (
    Impl,
    check_dtypes_and_devices,
    check_tensors,
    choose_implementation,
    keeps_states,
)
from ssmpretrain.kernels.selective_scan.inputs import ScanInputs
from ssmpretrain.kernels.selective_scan.op import run_kernel
from ssmpretrain.kernels.selective_scan.pytorch import PYTORCH_SCANS


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

    Signature and layout are those of mamba-ssm's `selective_scan_fn`. Arithmetic and state are float32 for all input
    dtypes. Every input is differentiable, and its gradient has its dtype. u, delta, z, B and C may have any strides and
    each its own dtype: float32, bfloat16 or float16. If u is float64, all inputs must be; the reference then computes
    in float64, for checks.

    Memory: for the backward pass the kernels keep their inputs and 4 E N / 64 bytes of states per token.

    Layout: on the GPU, threads hold neighbouring channels. u, delta and z are read fastest as transposes of (B, L, E)
    memory; if L is contiguous, as in mamba-ssm, they are copied first.

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
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
    _check(inputs)
    keep_states = keeps_states(inputs)
    implementation = choose_implementation("selective_scan", u, impl, inputs)
    if implementation in ("native", "triton"):
        y, last = run_kernel(inputs, keep_states, implementation)
    else:
        y, last = PYTORCH_SCANS[implementation](inputs)
    return (y, last.flatten(1, -2)) if return_last_state else y  # without an axis of groups


def _check(inputs: ScanInputs) -> None:
    u, A, B, C = inputs.u, inputs.A, inputs.B, inputs.C
    check_tensors(
        "selective_scan",
        {"u": u, "delta": inputs.delta, "A": A, "B": B, "C": C},
        {"D": inputs.D, "z": inputs.z, "delta_bias": inputs.delta_bias},
    )
    if u.ndim != 3 or 0 in u.shape[1:]:
        raise UserError(f"selective_scan: u is (B, E, L), none but B 0; got {tuple(u.shape)}. Change the shape.")
    batch, channels, tokens = u.shape
    if A.ndim != 2 or A.shape[0] != channels or A.shape[1] == 0:
        raise UserError(
            f"selective_scan: A is (E, N) with u's E = {channels} and N at least 1; "
            f"got {tuple(A.shape)}. Change the shape."
        )
    state = A.shape[1]
    for name, tensor in (("delta", inputs.delta), ("z", inputs.z)):
        if tensor is not None and tensor.shape != u.shape:
            raise UserError(
                f"selective_scan: {name} is (B, E, L) like u, {tuple(u.shape)}; "
                f"got {tuple(tensor.shape)}. Change the shape."
            )
    for name, tensor in (("D", inputs.D), ("delta_bias", inputs.delta_bias)):
        if tensor is not None and tensor.shape != (channels,):
            raise UserError(
                f"selective_scan: {name} is (E,) with u's E = {channels}; got {tuple(tensor.shape)}. Change the shape."
            )
    for name, rows in (("B", B), ("C", C)):
        if rows.ndim not in (3, 4) or (rows.shape[0], *rows.shape[-2:]) != (batch, state, tokens):
            raise UserError(
                f"selective_scan: {name} is (B, N, L) or (B, G, N, L) with B, N, L = {batch}, {state}, {tokens}; "
                f"got {tuple(rows.shape)}. Change the shape."
            )
        if rows.ndim == 4 and (rows.shape[1] == 0 or channels % rows.shape[1] != 0):
            raise UserError(
                f"selective_scan: the number of groups G of {name} divides u's E = {channels}; "
                f"got G = {rows.shape[1]} in {tuple(rows.shape)}. Change the shape."
            )
    if B.shape != C.shape:
        raise UserError(
            f"selective_scan: B and C share one shape; got B {tuple(B.shape)} and C {tuple(C.shape)}. Change the shape."
        )
    check_dtypes_and_devices("selective_scan", zip(inputs._fields, inputs, strict=True))
