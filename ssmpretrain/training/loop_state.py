"""Where Lightning's loops go on after a checkpoint that was saved before or during a validation."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

_BATCHES, _VALIDATION = "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"


def validation_is_due(trainer: Trainer) -> bool:
    """Whether a training batch is ending, and a validation comes next."""
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    batches: Any = loop.batch_progress.total
    in_batch_end = batches.completed == batches.processed - 1
    by_the_clock = getattr(trainer, "_val_check_time_interval", None) is not None
    return in_batch_end and not by_the_clock and fetcher is not None and loop._should_check_val_fx(fetcher)


def begin_with_validation(loops: dict[str, Any]) -> None:
    """Let the run that is continued from here hold the validation of its last batch, from the beginning, then train.

    By itself Lightning leaves out a validation that had not begun, and goes on in the middle of one that had: with
    sums and metrics of the second half alone.

    Args:
        loops: The checkpoint's ["loops"]["fit_loop"], changed in place.
    """
    for count in loops[_BATCHES]["total"], loops[_BATCHES]["current"]:
        count["completed"] = count["processed"]
    begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}  # what Lightning takes for "in its middle"
    loops[_VALIDATION] = {"total": begun, "current": dict(begun), "is_last_batch": False}


def forget_begun_validation(trainer: Trainer) -> None:
    """After a start by `begin_with_validation`: count as if the validation before had never begun."""
    validation = trainer.fit_loop.epoch_loop.val_loop
    if validation.restarted_mid_evaluation:
        validation.batch_progress.total.reset()
