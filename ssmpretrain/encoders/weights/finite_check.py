"""Check for NaN and infinite weights, wherever they are read or written."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssmpretrain.base.errors import UserError

_EARLIER = "Its training had diverged, or it is damaged: take an earlier checkpoint, or fetch it again."


def check_finite(
    where: str, state: Mapping[str, Any], source: object, remedy: str = _EARLIER, what: str = "weights"
) -> None:
    """Raise a ValueError that names the first tensor with NaN or infinite values, and counts them.

    Args:
        where: Opens the message.
        state: Tensors by name; anything else in it is left alone.
        source: Their holder, for the message: a file, or the name of an encoder.
        remedy: Sentence that says what to do instead.
        what: Name of the tensors in the message, in the plural.
    """
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    counts = {name: count for name, tensor in tensors.items() if (count := _num_not_finite(tensor))}
    if not counts:
        return
    first, count = next(iter(counts.items()))
    others = f", and some of {len(counts) - 1} more tensors" if len(counts) > 1 else ""
    raise UserError(
        f"{where}: {what} are finite numbers; in {source} {count:,} of {tensors[first].numel():,} values of {first} "
        f"are NaN or infinite{others}. {remedy}"
    )


def _num_not_finite(tensor: Tensor) -> int:
    """Count the values that are NaN or infinite; 0 for a tensor without fractions, or without values (on `meta`)."""
    if tensor.is_meta or not tensor.is_floating_point():
        return 0
    if tensor.element_size() == 1:  # there is no sum of float8
        tensor = tensor.float()
    # A sum of NaN or infinity is never finite, and takes a twentieth of the time of a look at every value.
    return 0 if math.isfinite(tensor.sum().item()) else int(torch.count_nonzero(~tensor.isfinite()))
