"""The contracts of the convolutions over tokens, and the choice of implementation."""

# B batch, E channels, L tokens, W taps

from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.kernels.causal_conv1d.op import convolve
from ssmpretrain.kernels.causal_conv1d.reference import (
    Activation,
    bidirectional_causal_conv1d_reference,
    causal_conv1d_reference,
    centred_conv1d_reference,
)
from ssmpretrain.kernels.dispatch import Impl, check_dtypes_and_devices, check_tensors, choose_implementation


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = None,
    reverse: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Convolve each channel with its own taps: `y_t = act(bias + sum_w weight_w x_{t - (W - 1) + w})`, zero before x_0.

    The layout is that of causal-conv1d. Arithmetic is float32 for all input dtypes, and autocast changes nothing: x may
    be bfloat16 while weight and bias stay float32. Every input is differentiable. Its gradient has its dtype and is the
    same bits on every run; only the inputs are kept for the backward pass. If x is float64, all inputs must be; the
    reference then computes in float64, for checks.

    Args:
        x: Input, (B, E, L), any strides; the kernels are fast where channels lie next to each other in memory, as in
            the transpose of a (B, L, E) tensor.
        weight: Taps, (E, W); the last one meets the current token.
        bias: Added before the activation, (E,), or None.
        activation: "silu", or None for none.
        reverse: Convolve the sequence read backwards: `x_{t + (W - 1) - w}`, zero past the end.
        impl: As for `selective_scan`.

    Returns:
        y, (B, E, L), in x's dtype and, where x is dense, with x's strides.

    Raises:
        ValueError: If a shape, dtype or device does not fit, L is 0, or activation or impl is unknown or cannot run
            here.

    Source: Gu & Dao, "Mamba" (arXiv:2312.00752), sec. 3.4.
    """
    _check_one("causal_conv1d", x, weight, bias, activation)
    implementation = choose_implementation("causal_conv1d", x, impl, (weight, bias))
    if implementation in ("native", "triton"):
        return _one(x, weight, bias, activation, implementation, reverse=reverse)
    return causal_conv1d_reference(x, weight, bias, activation=activation, reverse=reverse)


def centred_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = None,
    impl: Impl = "auto",
) -> Tensor:
    """Convolve with taps on both sides of a token: `y_t = act(bias + sum_w weight_w x_{t - W // 2 + w})`.

    Outside the sequence x is zero. With an even W, one tap more reads earlier tokens than later ones. All else is as in
    `causal_conv1d`.

    Args:
        x, bias, activation, impl: As for `causal_conv1d`.
        weight: Taps, (E, W); tap W // 2 meets the current token.

    Returns:
        y, (B, E, L), in x's dtype and, where x is dense, with x's strides.

    Raises:
        ValueError: As for `causal_conv1d`.
    """
    _check_one("centred_conv1d", x, weight, bias, activation)
    implementation = choose_implementation("centred_conv1d", x, impl, (weight, bias))
    if implementation in ("native", "triton"):
        return _one(x, weight, bias, activation, implementation, centred=True)
    return centred_conv1d_reference(x, weight, bias, activation=activation)


def bidirectional_causal_conv1d(
    x: Tensor,
    weights: Tensor,
    biases: Tensor | None = None,
    *,
    activation: Activation = None,
    impl: Impl = "auto",
) -> Tensor:
    """Compute `causal_conv1d` of x in both directions, each with its own taps; the kernel reads x once for both.

    Arithmetic, dtypes and autocast are as in `causal_conv1d`. The gradient of x sums both directions in one pass.

    Args:
        x: Input, (B, E, L), as for `causal_conv1d`.
        weights: Taps, (2, E, W); the last one meets the current token in both directions.
        biases: (2, E) or None.
        activation: "silu", or None for none.
        impl: As for `causal_conv1d`.

    Returns:
        (2, B, E, L), the causal direction first, in x's dtype; each direction has x's strides where x is dense, so a
        channel-last x gives (2, B, L, E) in memory.

    Raises:
        ValueError: As for `causal_conv1d`.

    Source: Zhu et al., "Vision Mamba" (arXiv:2401.09417), alg. 1.
    """
    op = "bidirectional_causal_conv1d"
    check_tensors(op, {"x": x, "weights": weights}, {"biases": biases})
    _check_input(op, x, activation)
    if weights.ndim != 3 or weights.shape[:2] != (2, x.shape[1]) or weights.shape[2] == 0:
        raise UserError(
            f"{op}: weights is (2, E, W) with x's E = {x.shape[1]} and W at least 1; "
            f"got {tuple(weights.shape)}. Change the shape."
        )
    if biases is not None and biases.shape != weights.shape[:2]:
        raise UserError(
            f"{op}: biases is (2, E) with x's E = {x.shape[1]}; got {tuple(biases.shape)}. Change the shape."
        )
    check_dtypes_and_devices(op, (("x", x), ("weights", weights), ("biases", biases)))
    implementation = choose_implementation(op, x, impl, (weights, biases))
    if implementation in ("native", "triton"):
        silu = activation == "silu"
        return convolve(x, weights, biases, implementation, reverse=False, centred=False, silu=silu)
    return bidirectional_causal_conv1d_reference(x, weights, biases, activation=activation)


def _one(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation,
    implementation: str,
    *,
    reverse: bool = False,
    centred: bool = False,
) -> Tensor:
    """Run the kernel of one convolution."""
    biases = None if bias is None else bias.unsqueeze(0)
    options = {"reverse": reverse, "centred": centred, "silu": activation == "silu"}
    return convolve(x, weight.unsqueeze(0), biases, implementation, **options).squeeze(0)


def _check_one(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> None:
    check_tensors(op, {"x": x, "weight": weight}, {"bias": bias})
    _check_input(op, x, activation)
    if weight.ndim != 2 or weight.shape[0] != x.shape[1] or weight.shape[1] == 0:
        raise UserError(
            f"{op}: weight is (E, W) with x's E = {x.shape[1]} and W at least 1; "
            f"got {tuple(weight.shape)}. Change the shape."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise UserError(f"{op}: bias is (E,) with x's E = {x.shape[1]}; got {tuple(bias.shape)}. Change the shape.")
    check_dtypes_and_devices(op, (("x", x), ("weight", weight), ("bias", bias)))


def _check_input(op: str, x: Tensor, activation: Activation) -> None:
    if x.ndim != 3 or 0 in x.shape[1:]:
        raise UserError(f"{op}: x is (B, E, L), none but B 0; got {tuple(x.shape)}. Change the shape.")
    if activation not in (None, "silu"):
        raise UserError(f"{op}: activation is 'silu' or None; got {activation!r}. Give one of them.")
