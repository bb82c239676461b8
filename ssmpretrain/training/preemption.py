"""Stopping a run from outside: by a signal to any of its processes, or when its time is up."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable, Iterator, Sized
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from ssmpretrain.training import loop_state, slurm
from ssmpretrain.training.any_rank import AnyRank
from ssmpretrain.training.run_folder import RunFolder
from ssmpretrain.training.stop_signals import STOPPED, give_back, say, take_over

T = TypeVar("T")
_TIME_IS_UP = 1000  # above all signals
_INTERRUPTED = 130
_CHILD_PATIENCE = 60  # seconds


class Preemption(Callback):
    """Stop all ranks after the same step, save, and leave with exit code 75, when any of them gets a signal.

    The signals are SIGTERM, SIGUSR1, SIGINT and SLURM's requeue signal; a second SIGINT stops at once. A handler only
    takes a note. After each optimizer step, and before each batch of a validation, the ranks tell each other, without
    waiting: what one of them was told, all know one step later. Never is a run stopped between accumulated batches. A
    validation that is cut off is held again, from its beginning, when the run is continued. What is asked for during
    the last step of a run changes nothing: the run is complete.

    Under SLURM the job is queued again, as `SLURMEnvironment(auto_requeue=..., requeue_signal=...)` says. During
    `validate` the command just ends. Lightning's own answers to these signals are switched off: they save in the
    middle of a step, and report success.

    Args:
        max_time: Stop in the same way when this process has trained so long; as Trainer's `max_time`, "DD:HH:MM:SS" or
            what `timedelta` takes, which would count the time of earlier processes too, and end the run.

    Raises:
        SystemExit: With code 75, after one line that says where the run stands.
    """

    def __init__(self, max_time: str | timedelta | dict[str, int] | None = None) -> None:
        self._seconds = Timer(max_time).time_remaining()
        self._started: float | None = None
        self._previous: dict[int, object] = {}
        self._told = 0  # the signal that this process got
        self._interrupted = False
        self._agreed = 0  # what all ranks know that one was told
        self._step = 0
        self._in_validation = False
        self._batches_watched = 0  # of this validation; as many on every rank

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._told = self._agreed = 0
        self._interrupted = self._in_validation = False
        self._started = None
        self._trainer = trainer
        self._any_rank = AnyRank()
        trainer._signal_connector = _NoSignals(trainer)
        # Lightning lets all ranks wait for word from rank 0 before each batch.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._give_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, SystemExit) and self._agreed and trainer.received_sigterm:
            exception.code = STOPPED  # Lightning's, after the step
        self._give_back()

    # Where a run can stop

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take_over(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loop_state.forget_begun_validation(trainer)
        self._take_over(trainer)
        self._agreed = self._agreed or self._any_rank.ask_and_wait(self._told)
        if self._agreed:
            self._leave(trainer)
        self._started, self._step = time.monotonic(), trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return  # accumulating
        self._step = trainer.global_step
        self._ask()
        if self._agreed and not trainer.fit_loop.epoch_loop._num_ready_batches_reached() and not _is_over(trainer):
            self._save_and_stop(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take_over(trainer)
        self._in_validation = not trainer.sanity_checking
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._batches_watched = self._any_rank.least(_count(sum(batches)))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._batches_watched > 0:
            self._batches_watched -= 1
            self._ask()
            if self._agreed:
                self._leave(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._in_validation = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ask()
        if self._agreed and not _is_over(trainer):
            self._save_and_stop(trainer)

    def watched(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield `batches`, and stop before one of them if asked to; the ranks may have unequally many."""
        watched = self._any_rank.least(_count(len(batches) if isinstance(batches, Sized) else math.inf))
        for number, batch in enumerate(batches):
            if number < watched:
                self._ask()
                if self._agreed:
                    self._leave(self._trainer)
            yield batch

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        in_batch_end = loop_state.is_in_batch_end(trainer)
        if self._in_validation or (in_batch_end and loop_state.validation_is_due(trainer)):
            loop_state.begin_with_validation(checkpoint["loops"]["fit_loop"])

    # How

    def _take_over(self, trainer: Trainer) -> None:
        if not self._previous:
            environment = slurm.slurm_of(trainer)
            extra = {environment.requeue_signal} if environment and environment.requeue_signal else set()
            self._previous = take_over({signal.SIGTERM, signal.SIGUSR1, signal.SIGINT} | extra, self._take_note)

    def _give_back(self) -> None:
        previous, self._previous = self._previous, {}
        give_back(previous)

    def _take_note(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = self._interrupted or signum == signal.SIGINT
        if not self._told and self._trainer.is_global_zero:
            second = "; a second one stops at once" if signum == signal.SIGINT else ""
            say(f"{signal.Signals(signum).name}: stopping after this step{second}")
        self._told = self._told or signum

    def _ask(self) -> None:
        if not self._agreed:
            told = self._told or (_TIME_IS_UP if self._is_time_up() else 0)
            self._agreed = self._any_rank.ask(told)

    def _is_time_up(self) -> bool:
        started, seconds = self._started, self._seconds
        return started is not None and seconds is not None and time.monotonic() - started >= seconds

    def _save_and_stop(self, trainer: Trainer) -> None:
        """Save now, and let Lightning stop when it has logged what belongs to this step."""
        self._save(trainer)
        trainer._signal_connector.received_sigterm = True

    def _leave(self, trainer: Trainer) -> None:
        """Save what is to be saved, and stop at once."""
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting and self._started is not None:
            self._save(trainer)
        raise SystemExit(_INTERRUPTED if self._agreed == signal.SIGINT and not fitting else STOPPED)

    def _save(self, trainer: Trainer) -> None:
        self._children = _take_children(trainer)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, Checkpoints):
                callback.save(trainer)

    def _report(self, trainer: Trainer) -> str:
        """One line: what stopped the run, where it stands, what comes next."""
        why = "its time (max_time) being up" if self._agreed == _TIME_IS_UP else signal.Signals(self._agreed).name
        if trainer.state.fn != TrainerFn.FITTING:
            return f"stopped by {why}"
        again = "start the same command again to continue"
        if self._started is None:
            return f"stopped by {why} before the first step; {again}"
        saved = _newest(RunFolder(trainer.default_root_dir)) if self._saves(trainer) else "nothing"
        queued = slurm.requeue(trainer, self._agreed)
        return f"stopped by {why} at step {trainer.global_step:,} (epoch {trainer.current_epoch:,}), saved {saved}; {queued or again}"
