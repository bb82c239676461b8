"""Exact resume: a continued run equals one that was never stopped."""

from __future__ import annotations

from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ssmpretrain.base import ranks
from ssmpretrain.base.lightning_private import (
    forget_restart,
    log_by_optimizer_step,
    loop_counts,
    set_logged_steps,
)
from ssmpretrain.base.seeds import seed_of_run, seed_step


class ExactResume(Callback):
    """Make the random numbers of a training step depend on the step alone, and repair the counters of a checkpoint.

    Before each batch the global generators are seeded from the run's seed, the epoch, the batch and the rank. So masks,
    dropout and drop path do not depend on earlier draws in training, in validation or in another process.

    A checkpoint may be saved at the end of any optimizer step, during a validation, or at the end of an epoch. A
    validation that was interrupted runs again in full, and then training continues.
    """

    def __init__(self) -> None:
        self._seed: int | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._seed is None:
            self._seed = torch.initial_seed()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        progress = cast(Any, trainer.fit_loop.epoch_progress.current)
        if progress.ready == progress.processed:
            trainer.fit_loop.restarting = False  # a new epoch begins, and nothing of it is done yet
        forget_restart(trainer)
        self._counted = False
        self._seed = ranks.gather(self._seed)[0]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._counted:
            log_by_optimizer_step(trainer)
            self._counted = True
        self.seed(trainer, batch_idx)

    def seed(self, trainer: Trainer, batch_idx: int) -> None:
        """Seed the global generators for a batch of the present epoch."""
        assert self._seed is not None
        seed_step(self._seed, trainer.current_epoch, batch_idx, trainer.global_rank)

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self._seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if seed_of_run() != torch.initial_seed():  # otherwise `seed_everything` has set the seed
            self._seed = state_dict["seed"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        data: Any = getattr(trainer, "datamodule", None)
        position = checkpoint.get(type(data).__qualname__, {})
        now = int(trainer.accumulate_grad_batches)
        put_in_order(checkpoint, position["stages"][-1]["accumulate"] if "stages" in position else now, now)
        _keep_settings(trainer, checkpoint)


def _keep_settings(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Replace the settings in a checkpoint by those of this run, because Lightning would restore the old ones.

    The module `optimizer_state` does the same for the optimizer.
    """
    for callback in trainer.early_stopping_callbacks:
        if (state := checkpoint.get("callbacks", {}).get(callback.state_key)) is not None:
            state["patience"] = callback.patience
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and (state := checkpoint.get(type(trainer.precision_plugin).__qualname__)):
        for name in ("growth_factor", "backoff_factor", "growth_interval"):
            state[name] = getattr(scaler, f"get_{name}")()


def put_in_order(checkpoint: dict[str, Any], accumulated: int, accumulate: int) -> None:
    """Bring Lightning's counters in a checkpoint into one form, whichever hook the checkpoint was saved in.

    Lightning reads from the counters where a run stopped. Without this repair it sometimes skips a validation that was
    due, counts an epoch twice, or fails to resume a second time.

    Args:
        checkpoint: Content of the checkpoint, changed in place.
        accumulated: Batches of a rank per optimizer step when the checkpoint was saved.
        accumulate: Batches of a rank per optimizer step now. The counter of batches is converted to this number.
    """
    epochs, batches, validation = loop_counts(checkpoint)
    ended = epochs["current"]["processed"] == epochs["current"]["ready"]
    # A step that was saved during or after its validation counts as completed; one that was saved before does not.
    validated = _all_equal(batches["current"]) and _all_equal(validation["current"]) and validation["is_last_batch"]
    for counts in epochs.values():
        done = counts["ready"] if ended else counts["ready"] - 1
        counts.update(started=counts["ready"], processed=done, completed=done)
    trained = batches["current"]["processed"]
    more = trained // accumulated * accumulate - trained if trained % accumulated == 0 else 0
    for counts in (batches["current"], batches["total"]):
        counts.update(dict.fromkeys(counts, counts["processed"] + more))
    validation["total"] = {"ready": 1, "started": 1, "processed": int(validated), "completed": int(validated)}
    validation["current"] = dict.fromkeys(validation["current"], 0)
    set_logged_steps(checkpoint, checkpoint["global_step"] - (not ended))


def _all_equal(counts: dict[str, int]) -> bool:
    return len(set(counts.values())) == 1
