"""Recomputation in the backward pass, with the same random numbers, so that no activation is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor, module: nn.Module) -> Tensor:
    """Return `function(x)`. Keep only `x` for the backward pass, and compute the activations again there.

    Masks, dropout, drop path and autocast are the same both times. Batch normalisation in `module`, which `function`
    uses, updates its running statistics only the first time.
    """
    contexts = (nullcontext(), _statistics_left_alone(module))
    return checkpoint(function, x, use_reentrant=False, context_fn=lambda: contexts)  # type: ignore[no-any-return]


@contextmanager
def _statistics_left_alone(module: nn.Module) -> Iterator[None]:
    """Stop batch normalisation from updating its statistics. Its output in training mode does not depend on them."""
    before = [
        (norm, norm.momentum, norm.num_batches_tracked) for norm in module.modules() if isinstance(norm, _BatchNorm)
    ]
    try:
        for norm, _, _ in before:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum, norm.num_batches_tracked = momentum, count
