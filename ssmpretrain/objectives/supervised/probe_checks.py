"""Checks of the options of a linear probe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.features.pooled import POOLINGS
from ssmpretrain.objectives.supervised.probe_heads import NORMALISATIONS
from ssmpretrain.training.optim.head_optimizer import HeadOptimizer


def check_options(normalisation: str, optimizer: object, **lists: Sequence[Any] | None) -> None:
    """Raise a `UserError` if an option of a probe is unknown, out of range, or given twice.

    Args:
        normalisation, optimizer: As in `LinearProbe`.
        **lists: Options that are lists, by name. Those that end in "learning_rates" hold base rates.
    """
    if normalisation not in NORMALISATIONS:
        raise UserError(
            f"LinearProbe: normalisation is one of {', '.join(NORMALISATIONS)}; got {normalisation!r}. MAE's is batch."
        )
    if not isinstance(optimizer, HeadOptimizer):
        raise UserError(
            "LinearProbe: optimizer is LARS, SGD or HeadAdamW, because each head has a rate of its own; got "
            f"{optimizer!r:.60}. Choose one of ssmpretrain.training.optim."
        )
    if unknown := set(lists.get("poolings") or ()) - set(POOLINGS):
        raise UserError(f"LinearProbe: poolings are some of {', '.join(POOLINGS)}; got {sorted(unknown)[0]!r}.")
    for name, values in lists.items():
        _check_list(name, values)


def _check_list(name: str, values: Sequence[Any] | None) -> None:
    if values is None:
        return
    if not len(values):
        raise UserError(f"LinearProbe: {name} names one or more; got none.")
    if len(set(values)) < len(values):
        raise UserError(f"LinearProbe: {name} are all different; got {list(values)}.")
    if name.endswith("learning_rates") and not all(0 < rate < float("inf") for rate in values):
        raise UserError(f"LinearProbe: {name} are above 0; got {list(values)}.")
