"""The contract of `ssd` and `bidirectional_ssd`, and the choice of implementation."""

# B batch, L tokens, H heads, P channels of a head, G groups of heads that share B and C, N state

import torch.nn.functional as F
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.kernels.dispatch import (
    Impl,
    check_dtypes_and_devices,
    check_tensors,
    choose_implementation,
    keeps_states,
)
from ssmpretrain.kernels.ssd.chunked import ssd_in_chunks
from ssmpretrain.kernels.ssd.inputs import SSDInputs
from ssmpretrain.kernels.ssd.op import run_kernel
from ssmpretrain.kernels.ssd.reference import ssd_reference


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    chunk: int | None = None,
    reverse: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Scan `h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t`, `y_t = C_t . h_t + D x_t`, gated by `silu(z_t)`: Mamba-2's scan.

    One decay serves all channels and states of a head, so chunks of tokens become matrix products. Decays and states
    are float32 for all dtypes. Every input is differentiable, and its gradient has its dtype. If x is float64, all
    inputs must be; the recurrence itself then computes in float64, for checks.

    Memory: for the backward pass the kernels keep their inputs and, per chunk, the states that enter it, 4 H N P bytes
    for each direction. A sequence of one chunk keeps no states.

    Args:
        x: Input, (B, L, H, P), float32, bfloat16, float16 or float64.
        dt: Step size, (B, L, H), not negative, after bias and softplus; any of these dtypes.
        A: (H,), float32; negative for a decaying state.
        B: Input projection, (B, L, G, N), where G divides H and head h reads group h // (H / G); in x's dtype.
        C: Output projection, shaped like B; in x's dtype.
        D: Skip weight, (H,), or None for no skip.
        z: Gate before its SiLU, (B, L, H, P), or None for no gate.
        chunk: Tokens of a chunk, a multiple of 16 up to 256. It changes speed and rounding only. None takes what is
            fast for these sizes.
        reverse: Scan from the last token to the first.
        impl: As for `selective_scan`.

    Returns:
        y, (B, L, H, P), in x's dtype, contiguous.

    Raises:
        ValueError: If a shape, dtype or device does not fit, or impl is unknown or cannot run here.

    Source: Dao & Gu, "Transformers are SSMs" (arXiv:2405.21060), section 6.
    """
    check("ssd", x, {"dt": dt}, {"A": A}, B, C, D, z, chunk)
    inputs = SSDInputs(x, B, C, D, dt, A, None, None, 1.0, chunk, z is not None)
    if reverse:
        inputs = inputs._replace(dt=None, A=None, dt_backward=dt, A_backward=A)
    return _gated("ssd", inputs, z, impl)


def bidirectional_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_backward: Tensor | None = None,
    A_backward: Tensor | None = None,
    divide_output: bool = True,
    chunk: int | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Scan a sequence by `ssd` in both directions, in one pass over its chunks.

    The directions share x, B and C. Each has its own step sizes and decays. With f and b, the two scans without skip,

        y = s (f + b) + D x, gated by silu(z),  s = 1/2 if divide_output, else 1

    Each token belongs to both scans. Inside a chunk, one masked product serves both directions.

    Args:
        x, dt, A, B, C, D, z, chunk, impl: As for `ssd`; dt and A belong to the direction from the first token on.
        dt_backward: Step size of the direction from the last token on, (B, L, H); None takes dt.
        A_backward: Its A, (H,), float32; None takes A.
        divide_output: Halve the sum of the two directions.

    Returns:
        y, (B, L, H, P), in x's dtype, contiguous.

    Raises:
        ValueError: As for `ssd`.
    """
    dt_backward, A_backward = dt if dt_backward is None else dt_backward, A if A_backward is None else A_backward
    steps, decays = {"dt": dt, "dt_backward": dt_backward}, {"A": A, "A_backward": A_backward}
    check("bidirectional_ssd", x, steps, decays, B, C, D, z, chunk)
    scale = 0.5 if divide_output else 1.0
    inputs = SSDInputs(x, B, C, D, dt, A, dt_backward, A_backward, scale, chunk, z is not None)
    return _gated("bidirectional_ssd", inputs, z, impl)


def _gated(op: str, inputs: SSDInputs, z: Tensor | None, impl: Impl) -> Tensor:
    """Run an implementation, and gate its float32 result if there is a gate."""
    y = run(op, inputs, impl)
    return y if z is None else (y * F.silu(z.to(y.dtype))).to(inputs.x.dtype)


def run(op: str, inputs: SSDInputs, impl: Impl) -> Tensor:
    """Choose an implementation for checked inputs and run it; return y, (B, L, H, P).

    Args:
        op: The operation's name, which opens the messages.
        inputs: Checked inputs.
        impl: The caller's choice.
    """
    implementation = choose_implementation(op, inputs.x, impl, inputs)
    if implementation in ("native", "triton"):
        return run_kernel(inputs, keeps_states(inputs), implementation)
    return (ssd_reference if implementation == "reference" else ssd_in_chunks)(inputs)


def check(
    op: str,
    x: Tensor,
    steps: dict[str, Tensor],
    decays: dict[str, Tensor],
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    chunk: int | None,
    positions: str = "B, L",
    routes: tuple[str, ...] | None = None,
) -> None:
    """Raise unless all shapes, dtypes and devices go together.

    Args:
        op: The operation's name, which opens the messages.
        x, B, C, D, z, chunk: As for `ssd`, but on any number of leading dimensions.
        steps: Step sizes by name.
        decays: A by name.
        positions: The leading dimensions as the messages name them.
        routes: With routes, the step sizes are (..., K, H) and A is (K, H).
    """
    check_tensors(op, {"x": x, **steps, **decays, "B": B, "C": C}, {"D": D, "z": z})
    leading = positions.count(",") + 1
    if x.ndim != leading + 2 or 0 in x.shape[1:]:
        raise UserError(f"{op}: x is ({positions}, H, P), none but B 0; got {tuple(x.shape)}. Change the shape.")
    at, heads = x.shape[:leading], x.shape[-2]
    of_step: tuple[int, ...] = (heads,)
    names, because = "H", ""
    if routes is not None:
        of_step, names = (len(routes), heads), "K, H"
        because = f" for the K = {len(routes)} routes {', '.join(routes)}"
    for name, step in steps.items():
        if step.shape != (*at, *of_step):
            raise UserError(
                f"{op}: {name} is ({positions}, {names}) = {(*at, *of_step)} like x{because}; "
                f"got {tuple(step.shape)}. Change the shape."
            )
    for name, decay in decays.items():
        if decay.shape != of_step:
            raise UserError(
                f"{op}: {name} is {'(H,)' if routes is None else '(K, H)'} with x's H = {heads}{because}; "
                f"got {tuple(decay.shape)}. Change the shape."
            )
    if D is not None and D.shape != (heads,):
        raise UserError(f"{op}: D is (H,) with x's H = {heads}; got {tuple(D.shape)}. Change the shape.")
    for name, rows in (("B", B), ("C", C)):
        if rows.ndim != leading + 2 or rows.shape[:leading] != at or 0 in rows.shape[1:]:
            raise UserError(
                f"{op}: {name} is ({positions}, G, N) with {positions} = {', '.join(map(str, at))} like x; "
                f"got {tuple(rows.shape)}. Change the shape."
            )
        if heads % rows.shape[-2] != 0:
            raise UserError(
                f"{op}: the number of groups G of {name} divides x's H = {heads}; "
                f"got G = {rows.shape[-2]} in {tuple(rows.shape)}. Change the shape."
            )
    if B.shape != C.shape:
        raise UserError(f"{op}: B and C share one shape; got B {tuple(B.shape)} and C {tuple(C.shape)}. Change one.")
    if z is not None and z.shape != x.shape:
        raise UserError(f"{op}: z is (B, L, H, P) like x, {tuple(x.shape)}; got {tuple(z.shape)}. Change the shape.")
    if chunk is not None and (not isinstance(chunk, int) or chunk < 16 or chunk > 256 or chunk % 16 != 0):
        raise UserError(f"{op}: chunk is a multiple of 16 from 16 to 256, or None; got {chunk!r}. Give one of them.")
    named = [("x", x), *steps.items(), *decays.items(), ("B", B), ("C", C), ("D", D), ("z", z)]
    check_dtypes_and_devices(op, named)
    for name, rows in (("B", B), ("C", C)):
        if rows.dtype != x.dtype:
            raise UserError(f"{op}: {name} has x's dtype, {x.dtype}; got {rows.dtype}. Convert it.")
