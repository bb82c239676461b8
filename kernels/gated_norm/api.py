"""The contract of `gated_rms_norm` and the choice of implementation."""

# B batch, L tokens, D channels

from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.kernels.dispatch import Impl, check_dtypes_and_devices, check_tensors, choose_implementation
from ssmpretrain.kernels.gated_norm.inputs import GatedNormInputs
from ssmpretrain.kernels.gated_norm.op import run_kernel
from ssmpretrain.kernels.gated_norm.reference import gated_rms_norm_reference


def gated_rms_norm(
    x: Tensor, z: Tensor, weight: Tensor, *, eps: float = 1e-5, groups: int = 1, impl: Impl = "auto"
) -> Tensor:
    """Compute `norm(x silu(z)) weight`, where `norm(h) = h / sqrt(mean(h^2) + eps)` over each group of channels.

    Arithmetic is float32 for all dtypes, and autocast changes nothing. Every input is differentiable, and its gradient
    has its dtype. Outputs and gradients are the same bits on every run. For the backward pass only the inputs are kept.
    If x is float64, all inputs must be; the reference then computes in float64, for checks.

    Args:
        x: Output of a scan, (B, L, D); any strides whose last is 1, others are copied.
        z: Gate before its SiLU, (B, L, D), in x's dtype.
        weight: Scale of the norm, (D,).
        eps: Added to the mean square, above 0.
        groups: Number of groups, a divisor of D.
        impl: As for `selective_scan`.

    Returns:
        The normed tokens, (B, L, D), in x's dtype, contiguous.

    Raises:
        ValueError: If a shape, dtype or device does not fit, or eps, groups or impl cannot be used.

    Source: Dao & Gu, "Transformers are SSMs" (arXiv:2405.21060), section 7.1; the gate comes before the norm, as in
        mamba-ssm's `Mamba2`.
    """
    check_tensors("gated_rms_norm", {"x": x, "z": z, "weight": weight})
    inputs = GatedNormInputs(x, z, weight, eps, groups)
    _check(inputs)
    implementation = choose_implementation("gated_rms_norm", x, impl, inputs)
    if implementation in ("native", "triton"):
        return run_kernel(inputs, implementation)
    return gated_rms_norm_reference(x, z, weight, eps=eps, groups=groups)


def _check(inputs: GatedNormInputs) -> None:
    x, z, weight, eps, groups = inputs
    if x.ndim != 3 or 0 in x.shape[1:]:
        raise UserError(f"gated_rms_norm: x is (B, L, D), none but B 0; got {tuple(x.shape)}. Change the shape.")
    if z.shape != x.shape:
        raise UserError(
            f"gated_rms_norm: z is (B, L, D) like x, {tuple(x.shape)}; got {tuple(z.shape)}. Change the shape."
        )
    if z.dtype != x.dtype:
        raise UserError(f"gated_rms_norm: z has x's dtype, {x.dtype}; got {z.dtype}. Convert it.")
    if weight.shape != x.shape[2:]:
        raise UserError(
            f"gated_rms_norm: weight is (D,) with x's D = {x.shape[2]}; got {tuple(weight.shape)}. Change the shape."
        )
    if not isinstance(eps, float | int) or not 0 < eps < float("inf"):
        raise UserError(
            f"gated_rms_norm: eps is above 0 and finite, so that a token of zeros has a norm; got {eps}. "
            "Choose another."
        )
    if groups < 1 or x.shape[2] % groups != 0:
        raise UserError(f"gated_rms_norm: groups divides x's D = {x.shape[2]}; got {groups}. Choose a divisor.")
    check_dtypes_and_devices("gated_rms_norm", (("x", x), ("z", z), ("weight", weight)))
