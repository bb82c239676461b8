"""Saving of checkpoints during a run: the steps at which they are saved, and the number that is kept."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from ssmpretrain.base import ranks
from ssmpretrain.base.errors import UserError
from ssmpretrain.base.lightning_private import (
    checkpoint_of,
    epoch_has_no_batch_left,
    finished_epochs,
    log_training_step,
    stops_early,
)
from ssmpretrain.base.run_folder import RunFolder
from ssmpretrain.base.wording import remedy
from ssmpretrain.encoders.weights.on_disk import sidecar
from ssmpretrain.training.checkpoints.files import CheckpointFiles
from ssmpretrain.training.checkpoints.folder import LAST, by_step, keep_newest, name_of, point_last
from ssmpretrain.training.optim.global_batch import GlobalBatch

_log = logging.getLogger(__name__)
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class CheckpointNotSaved(UserError, OSError):
    """A checkpoint could not be written. The message gives the path, the reason, and the newest one that remains."""


class Checkpoints(Checkpoint):
    """Save the run as `checkpoints/step-000041237.ckpt`, after whole optimizer steps only, and link `last.ckpt` to it.

    A checkpoint that is due at the last batch of an epoch is saved after the validation of that epoch. A run without a
    checkpoint is also saved before its first validation, because a first validation may fail. If a periodic save fails
    (disk full, quota), a warning is logged and training goes on. If the last save of a run fails, the run ends with an
    error.

    Args:
        every_n_steps: Optimizer steps between two checkpoints; None turns this rule off.
        every_n_minutes: Minutes after which a new checkpoint is due; None turns this rule off.
        every_n_epochs: Epochs between two checkpoints; None turns this rule off. The end of a run is always saved.
        keep: Number of checkpoints to keep, at least 2, because a crash may damage the newest one.
        async_save: Whether to write in a thread while training goes on. This needs host memory for one copy of the
            training state.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        every_n_minutes: float | None = None,
        every_n_epochs: int | None = 1,
        keep: int = 2,
        async_save: bool = False,
    ) -> None:
        for name, value in (
            ("every_n_steps", every_n_steps), ("every_n_minutes", every_n_minutes), ("every_n_epochs", every_n_epochs),
        ):  # fmt: skip
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"Checkpoints: {name} is positive and finite, or null for never; got {value}.")
        if keep < 2:
            raise UserError(f"Checkpoints: keep is at least 2, as the newest may be damaged; got {keep}.")
        self.every_n_steps = every_n_steps
        self.every_n_minutes = every_n_minutes
        self.every_n_epochs = every_n_epochs
        self.keep = keep
        self.async_save = async_save
        self._step = 0  # optimizer steps at the end of the last batch
        self._due = False  # whether a checkpoint is due at the end of this epoch
        self._saved: tuple[int, int] | None = None  # steps and epochs of the newest checkpoint
        self._begun = False  # whether a checkpoint was written or tried, or the run continues from one
        self._saved_at = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # keep a plugin of the user
            trainer.strategy.checkpoint_io = CheckpointFiles(self.async_save)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = RunFolder(trainer.default_root_dir).checkpoints
        if self._saved is None and not trainer.fast_dev_run and (earlier := by_step(folder)):  # type: ignore[attr-defined]
            raise UserError(
                f"Checkpoints: {folder} holds {earlier[0].name} of a run that this one does not go on with. Give "
                f"trainer.fit ckpt_path={str(folder / LAST)!r}, or the trainer another default_root_dir."
            )
        self._step, self._saved_at, self._due = trainer.global_step, time.monotonic(), False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return  # accumulating
        self._step = trainer.global_step
        if epoch_has_no_batch_left(trainer):
            self._due |= self._is_due(trainer)
        elif is_over(trainer):  # within an epoch: `on_train_epoch_end` is too late
            self.save(trainer)
        elif self._is_due(trainer):
            self._try_to_save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        due, self._due = self._due, False
        if is_over(trainer):
            if epoch_has_no_batch_left(trainer) or self._saved is None or self._saved[0] != trainer.global_step:
                self.save(trainer)
        elif due or (self.every_n_epochs and _place(trainer)[1] % self.every_n_epochs == 0):
            self._try_to_save(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        started = trainer.state.fn == TrainerFn.FITTING and trainer.global_step > 0
        if started and not self._begun:
            self._try_to_save(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["stopped_early"] = stops_early(trainer)
        with contextlib.suppress(ValueError):  # a data module without a batch size
            checkpoint["global_batch"] = asdict(GlobalBatch.of(trainer))
        if added := _observers_from_outside(trainer):
            checkpoint["observers"] = added

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._saved, self._begun = (checkpoint["global_step"], finished_epochs(checkpoint)), True

    def save(self, trainer: Trainer) -> None:
        """Save now and wait for the result, unless a checkpoint of this step and epoch exists.

        Every rank must call this, after a whole optimizer step.

        Raises:
            CheckpointNotSaved: On all ranks, if the checkpoint could not be written.
        """
        self._finish_earlier(trainer)
        self._begin(trainer)
        self._finish(trainer)

    def save_alone(self, trainer: Trainer) -> None:
        """Save now, on this rank alone. Each rank must hold all weights of the model.

        Raises:
            CheckpointNotSaved: If the checkpoint could not be written.
        """
        place, files = _place(trainer), trainer.strategy.checkpoint_io
        path = RunFolder(trainer.default_root_dir).checkpoints / name_of(place[0])
        if trainer.fast_dev_run or (place == self._saved and path.exists()):  # type: ignore[attr-defined]
            return
        try:
            with ranks.alone():
                files.save_checkpoint(checkpoint_of(trainer), path)
            if isinstance(files, CheckpointFiles):
                files.join()
            _make_newest(path, self.keep)
        except OSError as error:
            raise CheckpointNotSaved(_not_saved(path, error)) from error
        self._saved = place

    def _try_to_save(self, trainer: Trainer) -> None:
        self._finish_earlier(trainer)
        try:
            self._begin(trainer)
        except CheckpointNotSaved as error:
            _warn("%s Training goes on; the next save is tried.", error)

    def _finish_earlier(self, trainer: Trainer) -> None:
        try:
            self._finish(trainer)
        except CheckpointNotSaved as error:
            _warn("%s", error)

    def _begin(self, trainer: Trainer) -> None:
        """Write a checkpoint, or let the thread write it."""
        place = _place(trainer)
        path = RunFolder(trainer.default_root_dir).checkpoints / name_of(place[0])
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if place == self._saved and trainer.strategy.broadcast(path.exists()):
            return
        log_training_step(trainer)  # `MetricsLogger` leaves out the row that Lightning logs after it
        self._saved, self._saved_at, self._begun = place, time.monotonic(), True
        self._agree(trainer, self._write(trainer, path))

    def _write(self, trainer: Trainer, path: Path) -> str | None:
        """Write one checkpoint and make it the newest. Return the reason if this rank fails, else None."""
        try:
            trainer.save_checkpoint(path)
        except OSError as error:
            trainer.strategy.barrier("Trainer.save_checkpoint")  # where the other ranks are
            return _not_saved(path, error)
        if not trainer.is_global_zero:
            return None
        try:
            files = trainer.strategy.checkpoint_io
            if isinstance(files, CheckpointFiles):
                files.after_writing(lambda: _make_newest(path, self.keep))
            else:
                _make_newest(path, self.keep)
        except OSError as error:
            return _not_saved(path, error)
        return None

    def _finish(self, trainer: Trainer) -> None:
        """Wait for the thread, if there is one."""
        files, failure = trainer.strategy.checkpoint_io, None
        if self.async_save and isinstance(files, CheckpointFiles):
            try:
                files.join()
            except OSError as error:
                name = name_of(self._saved[0]) if self._saved else "a checkpoint"
                failure = _not_saved(RunFolder(trainer.default_root_dir).checkpoints / name, error)
            self._agree(trainer, failure)

    def _agree(self, trainer: Trainer, failure: str | None) -> None:
        """Raise on all ranks if writing failed on the first."""
        failure = trainer.strategy.broadcast(failure)
        if failure is not None:
            self._saved = None
            raise CheckpointNotSaved(failure)

    def _is_due(self, trainer: Trainer) -> bool:
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            return True
        if not self.every_n_minutes:
            return False
        due: bool = trainer.strategy.broadcast(time.monotonic() - self._saved_at >= 60 * self.every_n_minutes)
        return due


def _observers_from_outside(trainer: Trainer) -> list[str]:
    """Return the class paths of a user's callbacks that only observe; the run may continue without them."""
    kinds = {type(one) for one in trainer.callbacks if getattr(one, "observes_only", False)}  # type: ignore[attr-defined]
    paths = {f"{kind.__module__}.{kind.__qualname__}" for kind in kinds}
    return sorted(path for path in paths if not path.startswith("ssmpretrain."))


def _place(trainer: Trainer) -> tuple[int, int]:
    """Return the numbers of finished optimizer steps and epochs."""
    return trainer.global_step, trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]


def is_over(trainer: Trainer) -> bool:
    """Return whether the run ends at the present step."""
    (steps, epochs), loop = _place(trainer), trainer.fit_loop
    if loop.max_steps != -1 and steps >= loop.max_steps:
        return True
    if loop.max_epochs not in (None, -1) and epochs >= loop.max_epochs:
        return True
    return stops_early(trainer)


def _make_newest(path: Path, keep: int) -> None:
    if path.exists():  # a plugin of the user may write it later
        point_last(path)
        keep_newest(path.parent, keep)


def _not_saved(path: Path, error: OSError) -> str:
    """Return the message for a checkpoint that cannot be written. The file at fault may be one of a callback."""
    left = by_step(path.parent)
    remains = f"The newest that is there is {left[0].name}." if left else "There is no earlier one."
    why = error.strerror or str(error)
    if error.filename is not None and Path(error.filename) not in (path, sidecar(path)):
        why = f"{error.filename}: {why}"
    if error.errno not in _FULL:
        return f"{path}: not written: {why}. {remains} {remedy(error)}"
    with contextlib.suppress(OSError):
        why += f", {shutil.disk_usage(Path(error.filename or path).parent).free:,} bytes free"
    return f"{path}: not written: {why}. {remains} Free some space or raise the quota."


@rank_zero_only
def _warn(text: str, error: OSError) -> None:
    _log.warning(text, error)
