"""The contract of `cross_selective_scan` and the choice of implementation."""

# B batch, K routes, E channels, H x W map, L = H W, N state, R rank of the step size

from functools import partial

from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.kernels.cross_scan.cascade import cascade
from ssmpretrain.kernels.cross_scan.inputs import CrossScanInputs
from ssmpretrain.kernels.cross_scan.op import run_kernel
from ssmpretrain.kernels.cross_scan.reference import cross_selective_scan_reference
from ssmpretrain.kernels.cross_scan.routes import Mode, routes_of
from ssmpretrain.kernels.dispatch import (
    Impl,
    check_dtypes_and_devices,
    check_tensors,
    choose_implementation,
    keeps_states,
)
from ssmpretrain.kernels.selective_scan.pytorch import PYTORCH_SCANS


def cross_selective_scan(
    x: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    *,
    mode: Mode = "cross",
    impl: Impl = "auto",
) -> Tensor:
    """Scan a map along several routes, each with weights of its own, and add the results: the core of VMamba's SS2D.

    Route k visits the positions in its order. With u_t = x at the t-th of them, from h = 0,

        dt, B_t, C_t = x_proj[k] @ u_t
        delta_t = softplus(dt_proj[k] @ dt + dt_bias[k])
        h = exp(delta_t A[k]) h + delta_t u_t B_t
        y += C_t . h + D[k] u_t                              (y at the same position, summed over the routes)

    "cascade" restarts the state in every row: y is the sum of each row's scans forward (weights 0) and backward
    (weights 1), is normalised over the channels (LayerNorm without weights, eps 1e-5), and takes the place of x for the
    same along each column (weights 2 and 3).

    Mixed precision: parameters may be float32 while x is bfloat16 or float16, as under autocast. The projections
    (x_proj, dt_proj) are then rounded to x's dtype; their results, dt_bias, A, D, the step size and the state are
    float32, and so is the sum over the routes, which is returned as it is: published VMamba norms it in float32
    ("oflex"). Autocast itself changes nothing here. Gradients come in each input's own dtype.

    Memory: for the backward pass the CPU kernel keeps x and, per position, 4 K (R + 2N) bytes of dt, B and C (with
    padding) and 4 K E N / 64 bytes of states. First stage of VMamba-T (E = 96, N = 1, R = 6, K = 4, float32): 384 of x,
    192 and 24 bytes. There is one copy of x in working memory, not one for each route.

    Args:
        x: Map, (B, E, H, W), any strides, float32, bfloat16, float16, or float64 (which runs the reference).
        x_proj: (K, R + 2N, E), rows in the order dt, B, C.
        dt_proj: (K, E, R).
        dt_bias: Added before the softplus, (K, E).
        A: State matrix, diagonal, (K, E, N), float32; negative for a decaying state.
        D: Skip weight, (K, E).
        mode: "cross", "unidirectional", "bidirectional" or "cascade" (K = 4, in VMamba's order of weights), or a
            sequence of K routes such as ("h", "v_flip", "w7"); see `routes`.
        impl: As for `selective_scan`.

    Returns:
        y, (B, E, H, W), float32 (float64 for a float64 x) and, where x is dense, with x's strides. The sum of K routes
        may be too large for x's dtype, so it is not rounded before the norm that follows it.

    Raises:
        ValueError: If a shape, dtype or device does not fit, the mode does not exist, or impl is unknown or cannot run
            here.

    Source: Liu et al., "VMamba: Visual State Space Model" (arXiv:2401.10166), sec. 4.2.
    """
    inputs = CrossScanInputs(x, x_proj, dt_proj, dt_bias, A, D, routes_of("cross_selective_scan", mode))
    check_tensors("cross_selective_scan", inputs.tensors)
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise UserError(
            f"cross_selective_scan: x is (B, E, H, W), none but B 0; got {tuple(x.shape)}. Change the shape."
        )
    check_parameters("cross_selective_scan", inputs)
    keep_states = keeps_states(inputs)
    implementation = choose_implementation("cross_selective_scan", x, impl, inputs)
    if implementation in ("native", "triton"):
        kernel = partial(run_kernel, keep_states=keep_states, impl=implementation)
        return cascade(kernel, inputs) if mode == "cascade" else kernel(inputs)
    scan = PYTORCH_SCANS[implementation]
    return cross_selective_scan_reference(x, x_proj, dt_proj, dt_bias, A, D, mode=mode, scan=scan)


def check_parameters(op: str, inputs: CrossScanInputs) -> None:
    """Raise unless the parameters fit the routes and the channels of x, and all dtypes and devices go together.

    Args:
        op: The operation's name, which opens the messages.
        inputs: The operation's inputs; of the shape of x only the channels count, (B, E, ...).
    """
    x, x_proj, dt_proj, dt_bias, A, D, routes = inputs
    routes_and_channels = (len(routes), x.shape[1])
    expected = f"K = {len(routes)} routes ({', '.join(routes)}) and x's E = {x.shape[1]}"
    for name, columns, tensor in (("dt_proj", "R", dt_proj), ("A", "N", A)):
        if tensor.ndim != 3 or tensor.shape[:2] != routes_and_channels or tensor.shape[2] == 0:
            raise UserError(
                f"{op}: {name} is (K, E, {columns}) with {expected}; got {tuple(tensor.shape)}. Change the shape."
            )
    for name, tensor in (("dt_bias", dt_bias), ("D", D)):
        if tensor.shape != routes_and_channels:
            raise UserError(f"{op}: {name} is (K, E) with {expected}; got {tuple(tensor.shape)}. Change the shape.")
    rank, state = dt_proj.shape[2], A.shape[2]
    if x_proj.shape != (len(routes), rank + 2 * state, x.shape[1]):
        raise UserError(
            f"{op}: x_proj is (K, R + 2N, E) = {(len(routes), rank + 2 * state, x.shape[1])} "
            f"with R from dt_proj and N from A; got {tuple(x_proj.shape)}. Change the shape."
        )
    check_dtypes_and_devices(op, zip(inputs._fields, inputs, strict=True))
