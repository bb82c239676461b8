"""The contract of `bidirectional_scan` and the choice of implementation."""

# B batch, L tokens, E channels, N state, R rank of the step size, W width of the convolution

from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.kernels.bidirectional_scan.inputs import BidirectionalInputs, ScanDirection
from ssmpretrain.kernels.bidirectional_scan.op import run_kernel
from ssmpretrain.kernels.bidirectional_scan.reference import bidirectional_scan_reference
from ssmpretrain.kernels.dispatch import (
    Impl,
    check_dtypes_and_devices,
    check_tensors,
    choose_implementation,
    keeps_states,
)
from ssmpretrain.kernels.selective_scan.pytorch import PYTORCH_SCANS


def bidirectional_scan(
    xz: Tensor,
    forward: ScanDirection,
    backward: ScanDirection | None = None,
    *,
    divide_output: bool = True,
    impl: Impl = "auto",
) -> Tensor:
    """Compute `silu(z) * (y_forward + y_backward)`, halved when divide_output: the core of Vim's mixer.

    With x, z = the halves of xz, each direction computes, from its own parameters,

        u = silu(conv(x) + conv_bias)
        dt, B, C = u @ x_proj.T
        y = selective_scan(u, softplus(dt @ dt_proj.T + dt_bias), A, B, C) + D * u

    where conv is depthwise and causal. The backward direction runs from the last token to the first. Its convolution is
    anti-causal, as if x were flipped and the result flipped back. Nothing is flipped in memory.

    Mixed precision: parameters may be float32 while xz is bfloat16 or float16, as under autocast. The projections
    (x_proj, dt_proj) are then used in xz's dtype and u is rounded to it; the convolution, dt_bias, A, D, the step size
    and the state stay float32. Autocast itself changes nothing here. The gradient of each input has its dtype.

    Memory: for the backward pass both kernels keep xz, the projected dt, B and C of each token and direction, and one
    state every 64 steps. They compute u, the step size and y again. Bytes per token and direction besides xz: on the
    CPU 4 (R + 2N) rounded up to 16 columns and 4 E N / 64, on the GPU the same with 2 columns. Vim-Ti (E = 384, N = 16,
    R = 12): 4224 in float32 on the CPU with xz's 3072; 2656 in bfloat16 on the GPU with xz's 1536, where keeping u, the
    step size and y as well would take 7264. Without gradients nothing is kept.

    Args:
        xz: Input and gate side by side, (B, L, 2E), float32, bfloat16, float16, or float64 (which runs the reference).
        forward: Parameters of the direction that reads tokens in order.
        backward: Parameters of the other direction, or None for a one-directional block.
        divide_output: Halve the sum of the two directions; no effect with one.
        impl: As for `selective_scan`.

    Returns:
        The gated sum, (B, L, E), in xz's dtype, contiguous.

    Raises:
        ValueError: If a shape, dtype or device does not fit, or impl is unknown or cannot run here.

    Source: Zhu et al., "Vision Mamba" (arXiv:2401.09417), alg. 1.
    """
    _check(xz, forward, backward)
    directions = (forward,) if backward is None else (forward, backward)
    tensors = (xz, *forward) if backward is None else (xz, *forward, *backward)
    keep_states = keeps_states(tensors)
    implementation = choose_implementation("bidirectional_scan", xz, impl, tensors)
    if implementation in ("native", "triton"):
        return run_kernel(BidirectionalInputs(xz, directions, divide_output), keep_states, implementation)
    scan = PYTORCH_SCANS[implementation]
    return bidirectional_scan_reference(xz, forward, backward, divide_output=divide_output, scan=scan)


def _check(xz: Tensor, forward: ScanDirection, backward: ScanDirection | None) -> None:
    check_tensors("bidirectional_scan", {"xz": xz})
    for which, direction in (("forward", forward), ("backward", backward)):
        if isinstance(direction, ScanDirection):
            parameters = zip(direction._fields, direction, strict=True)
            check_tensors("bidirectional_scan", {f"{which}.{name}": value for name, value in parameters})
        elif which == "forward" or direction is not None:
            raise UserError(
                f"bidirectional_scan: {which} is a ScanDirection{' or None' if which == 'backward' else ''}; "
                f"got {type(direction).__name__}. Give one."
            )
    if xz.ndim != 3 or 0 in xz.shape[1:] or xz.shape[-1] % 2 != 0:
        raise UserError(
            f"bidirectional_scan: xz is (B, L, 2E), x and z side by side, none but B 0; "
            f"got {tuple(xz.shape)}. Change the shape."
        )
    channels = xz.shape[-1] // 2
    named = [("xz", xz), *_checked_shapes("forward", forward, channels)]
    if backward is not None:
        named += _checked_shapes("backward", backward, channels)
        for name, one, other in zip(ScanDirection._fields, forward, backward, strict=True):
            if one.shape != other.shape:
                raise UserError(
                    f"bidirectional_scan: both directions have parameters of the same shapes; "
                    f"got {name} {tuple(one.shape)} forward and {tuple(other.shape)} backward. Change the shape."
                )
    check_dtypes_and_devices("bidirectional_scan", named)


def _checked_shapes(which: str, p: ScanDirection, channels: int) -> list[tuple[str, Tensor]]:
    """Return the parameters of one direction with their names, or raise if a shape does not fit."""
    for name in ("conv_weight", "dt_proj", "A"):
        tensor: Tensor = getattr(p, name)
        if tensor.ndim != 2 or tensor.shape[0] != channels or tensor.shape[1] == 0:
            columns = {"conv_weight": "W", "dt_proj": "R", "A": "N"}[name]
            raise UserError(
                f"bidirectional_scan: {which}.{name} is (E, {columns}) with E = {channels}, half of xz's last size; "
                f"got {tuple(tensor.shape)}. Change the shape."
            )
    for name in ("conv_bias", "dt_bias", "D"):
        tensor = getattr(p, name)
        if tensor.shape != (channels,):
            raise UserError(
                f"bidirectional_scan: {which}.{name} is (E,) with E = {channels}, half of xz's last size; "
                f"got {tuple(tensor.shape)}. Change the shape."
            )
    rank, state = p.dt_proj.shape[1], p.A.shape[1]
    if p.x_proj.shape != (rank + 2 * state, channels):
        raise UserError(
            f"bidirectional_scan: {which}.x_proj is (R + 2N, E) = {(rank + 2 * state, channels)} "
            f"with R from dt_proj and N from A; got {tuple(p.x_proj.shape)}. Change the shape."
        )
    return [(f"{which}.{name}", tensor) for name, tensor in zip(p._fields, p, strict=True)]
