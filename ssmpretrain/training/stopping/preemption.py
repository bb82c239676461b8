"""Stopping a run from outside: by a signal to any of its processes, or when its time is up."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn

from ssmpretrain.base import ranks
from ssmpretrain.base.lightning_private import (
    epoch_has_no_batch_left,
    leave_signals_alone,
    loop_counts,
    script_children,
    stop_after_this_step,
)
from ssmpretrain.base.run_folder import RunFolder
from ssmpretrain.training.checkpoints.saving import Checkpoints, is_over
from ssmpretrain.training.ranks.launcher import end_ranks, take_children
from ssmpretrain.training.ranks.reductions import RankReductions
from ssmpretrain.training.stopping import slurm
from ssmpretrain.training.stopping.data_wait import DataWait, saved_by_another
from ssmpretrain.training.stopping.signals import INTERRUPTED, STOPPED, install_handlers, restore_handlers, say
from ssmpretrain.training.stopping.time_limit import TimeLimit, seconds_of

T = TypeVar("T")
_TIME_IS_UP = 1000  # above all signals
_CHILD_PATIENCE = 60  # seconds


class Preemption(Callback):
    """Stop all ranks after the same step, save, and leave with exit code 75, when any rank gets a signal.

    The signals are SIGTERM, SIGUSR1, SIGINT and SLURM's requeue signal; a second SIGINT stops at once. The handler only
    sets a flag. After each optimizer step, and before each batch of a validation, the ranks exchange their flags
    without waiting, so all ranks know of a signal one step later. A run never stops between accumulated batches. A
    validation that is interrupted starts again from its beginning when the run continues. A signal during the last step
    of a run has no effect, because the run is then complete. With `ExactResume`, which every `Objective` adds, the run
    continues as if it had never stopped. `DataWait` stops a run whose batches never arrive.

    Under SLURM the job is queued again if `SLURMEnvironment(auto_requeue=..., requeue_signal=...)` asks for it. The
    command `validate` ends without saving. Lightning's own handlers are switched off, because they save in the middle
    of a step and report success. Without `Checkpoints` among the callbacks nothing is saved.

    Args:
        max_time: Training time of this process after which the run stops in the same way: "DD:HH:MM:SS", a `timedelta`,
            or the arguments of a `timedelta` by name. The trainer's own `max_time` also counts the time of earlier
            processes, and ends the run as complete.

    Raises:
        SystemExit: With code 75, after one line that reports the step of the run.
        UserError: If max_time is not above 0.
    """

    def __init__(self, max_time: TimeLimit = None) -> None:
        self._seconds = seconds_of(max_time)
        self._previous: dict[int, object] = {}  # former handlers by signal
        self._begin()

    def _begin(self) -> None:
        self._told = 0  # signal that this process received; 0 for none
        self._interrupted = False
        self._agreed = 0  # signal that all ranks know of; 0 for none
        self._started: float | None = None  # time at which training started
        self._step = 0
        self._in_validation = False
        self._batches_to_watch = 0  # batches left of this validation that every rank has
        self._children: list[subprocess.Popen[bytes]] = []
        self._data = DataWait(self._save_alone, self._pass_on, self._end)
        self._cut_short = False  # whether the run stops between accumulated batches

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._begin()
        self._trainer = trainer
        self._ranks = RankReductions()
        leave_signals_alone(trainer)
        for loop in (trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop):
            self._data.watch(loop)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore_handlers()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore_handlers()
        left = exception if isinstance(exception, SystemExit) else None
        if left is None and (signum := saved_by_another()):  # this rank failed because the other one left
            self._told = self._told or signum
            self._begin_to_leave()
            left = SystemExit()
        if left is None:
            return
        if self._agreed:
            left.code = self._code()  # the SystemExit of Lightning has no code
            if trainer.is_global_zero:
                print(f"ssmpretrain: {self._report()}", file=sys.stderr, flush=True)
        else:
            self._children = take_children(trainer)
            for child in self._children:
                child.terminate()
        end_ranks(self._children, _CHILD_PATIENCE)
        if left is not exception:
            raise left from exception

    # Hooks of Lightning: points at which a run can stop

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._install_handlers()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._install_handlers()
        self._agreed = self._agreed or self._ranks.greatest(self._told)
        if self._agreed:
            self._leave()
        self._started, self._step = time.monotonic(), trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return  # accumulating
        self._step = trainer.global_step
        self._ask()
        if not epoch_has_no_batch_left(trainer):  # otherwise wait for `on_train_epoch_end`
            self._stop_after_this()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._install_handlers()
        self._in_validation = not trainer.sanity_checking
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._batches_to_watch = self._ranks.least(_countable(sum(batches)))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._batches_to_watch > 0:
            self._batches_to_watch -= 1
            self._ask()
            if self._agreed:
                self._leave()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._in_validation = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ask()
        self._stop_after_this()

    def _watched(self, batches: Iterable[T]) -> Iterator[T]:
        to_watch = self._ranks.least(_countable(len(batches) if isinstance(batches, Sized) else math.inf))
        for number, batch in enumerate(self._data.each(batches)):
            if number < to_watch:
                self._ask()
                if self._agreed:
                    self._leave()
            yield batch

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        counts = loop_counts(checkpoint)
        if self._in_validation:  # it does not end with its last batch: callbacks may have loops of their own
            counts.validation["is_last_batch"] = False
        elif self._cut_short:  # the run trains the batches of this step again
            begun = counts.batches["current"]["processed"] % trainer.accumulate_grad_batches
            for part in (counts.batches["current"], counts.batches["total"]):
                part.update({name: count - begun for name, count in part.items()})

    # Signals and saving

    def _install_handlers(self) -> None:
        if not self._previous:
            job = slurm.job_of(self._trainer)
            requeue = {job.requeue_signal} if job is not None and job.requeue_signal else set()
            signals = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT} | requeue
            self._previous = install_handlers(signals, self._take_note)
            self._data.listen(signals)

    def _restore_handlers(self) -> None:
        self._data.over()
        previous, self._previous = self._previous, {}
        restore_handlers(previous)

    def _take_note(self, signum: int, frame: FrameType | None) -> None:
        if (waits := self._data.answer()) is not None:  # this process sent the signal itself
            if waits:
                self._begin_to_leave()
                self._data.leave(self._told)
                raise SystemExit(self._code())
            return
        if signum == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        if not self._told and self._trainer.is_global_zero:
            second = "; a second one stops at once" if signum == signal.SIGINT else ""
            say(f"ssmpretrain: {signal.Signals(signum).name}: stopping after this step{second}")
        self._told = self._told or signum

    def _ask(self) -> None:
        if not self._agreed:
            self._agreed = self._ranks.greatest_so_far(self._told or (_TIME_IS_UP if self._is_time_up() else 0))

    def _is_time_up(self) -> bool:
        started, seconds = self._started, self._seconds
        return started is not None and seconds is not None and time.monotonic() - started >= seconds

    def _stop_after_this(self) -> None:
        """Save if the run stops before its end. Lightning stops after it has logged this step."""
        if self._agreed and not is_over(self._trainer):
            self._children += take_children(self._trainer)
            self._save()
            stop_after_this_step(self._trainer)

    def _leave(self) -> None:
        """Save and leave now."""
        self._begin_to_leave()
        if self._started is not None:
            self._save()
        raise SystemExit(self._code())

    def _begin_to_leave(self) -> None:
        self._agreed = self._agreed or self._told
        self._children += take_children(self._trainer)

    def _save_alone(self) -> None:
        """Save between two steps on this rank, if this rank holds all weights."""
        whole = type(self._trainer.strategy) in (SingleDeviceStrategy, DDPStrategy)  # DeepSpeed derives from the latter
        if self._started is None or not whole:
            return
        self._cut_short = True
        for callback in self._trainer.checkpoint_callbacks:
            if isinstance(callback, Checkpoints):
                callback.save_alone(self._trainer)

    def _pass_on(self, signum: int) -> None:
        for child in script_children(self._trainer):  # a second SIGINT would stop them at once
            child.send_signal(signal.SIGTERM if signum == signal.SIGINT else signum)

    def _end(self, signum: int) -> None:
        """Report and end this process from another thread than the main one."""
        self._told = self._told or signum
        self._begin_to_leave()
        if self._trainer.is_global_zero:
            say(f"ssmpretrain: {self._report()}")
            end_ranks(self._children, _CHILD_PATIENCE)
        os._exit(self._code())

    def _save(self) -> None:
        for callback in self._trainer.checkpoint_callbacks:
            if isinstance(callback, Checkpoints):
                callback.save(self._trainer)

    def _code(self) -> int:
        fitting = self._trainer.state.fn == TrainerFn.FITTING
        return INTERRUPTED if self._agreed == signal.SIGINT and not fitting else STOPPED

    def _report(self) -> str:
        """Return a message with the cause of the stop, the step of the run, and the next command."""
        trainer = self._trainer
        why = "max_time" if self._agreed == _TIME_IS_UP else signal.Signals(self._agreed).name
        if trainer.state.fn != TrainerFn.FITTING:
            return f"stopped by {why}"
        where, saved = "before the first step", ""
        if self._started is not None:
            where = f"at step {trainer.global_step:,} (epoch {trainer.current_epoch:,})"
            saved = f", saved {_newest(trainer)}"
        queued = slurm.requeue(trainer, self._agreed)
        return f"stopped by {why} {where}{saved}; {queued or 'start the same command again to continue'}"


def watched(trainer: Trainer, batches: Iterable[T]) -> Iterator[T]:
    """Yield `batches` of a callback's own loop. The run can stop before each batch.

    The ranks may have different numbers of batches.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Preemption):
            return callback._watched(batches)
    return iter(batches)


def _countable(batches: float) -> int:
    """Return the number of batches if it is known; 0 if it is unknown and there are several ranks."""
    if math.isinf(batches):
        return 0 if ranks.world() > 1 else sys.maxsize
    return int(batches)


def _newest(trainer: Trainer) -> Path | str:
    if not any(isinstance(callback, Checkpoints) for callback in trainer.checkpoint_callbacks):
        return "nothing"
    last = RunFolder(trainer.default_root_dir).last_checkpoint
    return last.with_name(os.readlink(last)) if last.is_symlink() else last
