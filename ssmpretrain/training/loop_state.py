"""Where Lightning's loops go on after a checkpoint that was saved before or during a validation."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

_BATCHES, _VALIDATION = "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"


def validation_is_due(trainer: Trainer) -> bool:
    """Whether the training batch that is ending will be followed by a validation."""
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    by_the_clock = trainer._val_check_time_interval is not None
    return not by_the_clock and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def is_in_batch_end(trainer: Trainer) -> bool:
    """Whether `on_train_batch_end` is running."""
    batches = trainer.fit_loop.epoch_loop.batch_progress.total
    return batches.completed == batches.processed - 1


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
