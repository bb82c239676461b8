"""The contract of `decay_scan` and the choice of implementation."""

from torch import Tensor

from decay_scan.op import decay_scan_op
from decay_scan.reference import decay_scan_reference
from ssmpretrain.kernels.dispatch import Impl, check_dtypes_and_devices, choose_implementation


def decay_scan(x: Tensor, log_decay: Tensor, *, reverse: bool = False, impl: Impl = "auto") -> Tensor:
    """Scan `y_t = exp(log_decay_t) y_{t-1} + x_t` along the tokens, from `y_{-1} = 0`.

    Args:
        x: Input, (B, L, D), float32.
        log_decay: Natural logarithm of the decay of each step, (B, L, D), at most 0.
        reverse: Scan from the last token to the first.
        impl: As for `selective_scan`.

    Returns:
        y, (B, L, D), float32, contiguous.

    Raises:
        ValueError: If the shapes differ.

    Source: Martin & Cundy, "Parallelizing Linear Recurrent Neural Nets Over Sequence Length" (arXiv:1709.04057).
    """
    if x.ndim != 3 or x.shape != log_decay.shape:
        raise ValueError(
            f"decay_scan: x and log_decay share one shape (B, L, D); "
            f"got x {tuple(x.shape)} and log_decay {tuple(log_decay.shape)}"
        )
    check_dtypes_and_devices("decay_scan", (("x", x), ("log_decay", log_decay)))
    implementation = choose_implementation("decay_scan", x, impl, (log_decay,))
    if implementation in ("native", "triton"):
        y: Tensor = decay_scan_op(x, log_decay, reverse, implementation)
        return y
    return decay_scan_reference(x, log_decay, reverse=reverse)
