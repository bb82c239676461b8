"""Check for NaN and infinite weights, used for all files that are read or written."""

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
    """Raise a ValueError if a tensor has NaN or infinite values.

    The error names the first such tensor and the number of such values.

    Args:
        where: Name of the caller, used at the start of the error message.
        state: Tensors by name. Values that are not tensors are skipped.
        source: Path of the file, or name of the encoder, used in the error message.
        remedy: Sentence that says what to do, used at the end of the error message.
        what: Word for the tensors in the error message, in the plural.
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
    """Return the number of NaN and infinite values; 0 for integer tensors and for tensors on the meta device."""
    if tensor.is_meta or not tensor.is_floating_point():
        return 0
    if tensor.element_size() == 1:  # PyTorch has no sum for float8
        tensor = tensor.float()
    # The sum is not finite if a value is NaN or infinite. It takes a twentieth of the time of a check of each value.
    return 0 if math.isfinite(tensor.sum().item()) else int(torch.count_nonzero(~tensor.isfinite()))
