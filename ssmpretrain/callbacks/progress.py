"""Progress of a run: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from ssmpretrain.base.errors import UserError

_log = logging.getLogger(__name__)


def progress_bar() -> ProgressBar:
    """Return a progress bar if standard output is a terminal, otherwise a callback that prints plain lines."""
    return _Bar(leave=False) if sys.stdout.isatty() else PlainProgress()


class Throughput(Callback):
    """Measure images per second and the share of time spent waiting for data; log advice once if that share is large.

    Args:
        every_n_steps: Steps over which one value is averaged, at least 1.
        much: Share of the time spent waiting, in [0, 1], above which advice is logged.
        patience: Seconds of training during which the share must stay above `much`.

    Logs:
        train/images_per_second: Images per second over all devices.
        train/data_wait: Fraction of the time, in [0, 1], in which the loop waited for the next batch.
    """

    observes_only = True

    def __init__(self, every_n_steps: int = 50, much: float = 0.2, patience: float = 60.0) -> None:
        if every_n_steps < 1:
            raise UserError(f"Throughput: every_n_steps is at least 1; got {every_n_steps}")
        self.every_n_steps, self.much, self.patience = every_n_steps, much, patience
        self._long = self._long_waited = 0.0  # seconds in which waiting stayed above `much`
        self._hinted = False
        self._restart()

    def _restart(self) -> None:
        self._since = self._batch_ended = time.perf_counter()
        self._images = self._batches = 0
        self._waited = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart()  # validation and the start of the workers are not training

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._waited += time.perf_counter() - self._batch_ended

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batch_ended = time.perf_counter()
        images = batch["image"] if "image" in batch else batch["views"][0]  # several views of an image count as one
        self._images += len(images) * trainer.world_size
        self._batches += 1
        if self._batches == self.every_n_steps:
            elapsed = self._batch_ended - self._since
            pl_module.log("train/images_per_second", self._images / elapsed, prog_bar=True)
            pl_module.log("train/data_wait", self._waited / elapsed)
            self._consider_hint(trainer, elapsed)
            self._restart()

    def _consider_hint(self, trainer: Trainer, elapsed: float) -> None:
        if self._waited < self.much * elapsed:
            self._long = self._long_waited = 0.0
            return
        self._long += elapsed
        self._long_waited += self._waited
        if self._long >= self.patience and not self._hinted and trainer.is_global_zero:
            self._hinted = True
            workers = getattr(trainer.train_dataloader, "num_workers", None)
            _log.warning(data_wait_hint(self._long_waited / self._long, workers, num_cores(trainer.num_devices)))


def num_cores(ranks: int) -> int:
    """Return the number of cores per rank, for `ranks` ranks on this machine, or as SLURM assigned them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if "SLURM_CPUS_PER_TASK" in os.environ else max(1, cores // ranks)


def data_wait_hint(share: float, workers: int | None, cores: int) -> str:
    """Return advice on training that waits for data.

    Args:
        share: Share of the time that training waits, in [0, 1].
        workers: Worker processes per rank that decode images; None if unknown.
        cores: Cores that a rank may use.
    """
    now = "" if workers is None else f" with {workers} worker{'s' * (workers != 1)}"
    found = f"data: training waits for images {share:.0%} of the time{now}; this process may use {cores} cores."
    if workers is not None and workers < cores - 1:
        return f"{found} Set data.init_args.num_workers to {cores - 1} or so."
    return (
        f"{found} More workers will not help: give it more cores, keep smaller images in the shards, "
        "use each decoded image several times (data.init_args.repeats), or read from a faster disk."
    )


def _with_wait(shown: dict[str, Any], trainer: Trainer) -> dict[str, Any]:
    """Return the metrics of a progress line, together with the share of time that training waits for data."""
    wait = trainer.callback_metrics.get("train/data_wait")
    return shown if wait is None else {**shown, "data_wait": f"{100 * float(wait):.0f} %"}


class _Bar(TQDMProgressBar):
    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return _with_wait(super().get_metrics(trainer, pl_module), trainer)


class PlainProgress(ProgressBar):
    """Print a line of progress at intervals, for log files and pipes.

    Args:
        every_seconds: Least time between two lines of training, in seconds. The last step of an epoch and every
            validation always get a line.
    """

    observes_only = True

    def __init__(self, every_seconds: float = 10.0) -> None:
        super().__init__()
        self.every_seconds = every_seconds
        self._started = self._printed = 0.0

    def disable(self) -> None:
        """Print nothing from now on; Lightning calls this on every rank but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Print lines again."""
        self._enabled = True

    _enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started, self._first_step = time.perf_counter(), trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        if now - self._printed >= self.every_seconds or batch_idx + 1 == trainer.num_training_batches:
            self._printed = now
            self._print(
                trainer, f"step {trainer.global_step}/{int(trainer.estimated_stepping_batches)}", self._left(now)
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._print(trainer, "validation", "")

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return _with_wait(super().get_metrics(trainer, pl_module), trainer)

    def _left(self, now: float) -> str:
        done = self.trainer.global_step - self._first_step
        seconds = (
            (now - self._started)
            / max(done, 1)
            * (int(self.trainer.estimated_stepping_batches) - self.trainer.global_step)
        )
        return f"  {int(seconds // 60)}:{int(seconds % 60):02d} left"

    def _print(self, trainer: Trainer, what: str, tail: str) -> None:
        if self._enabled:
            metrics = {k: v for k, v in self.get_metrics(trainer, trainer.lightning_module).items() if k != "v_num"}
            values = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())
            fitting = trainer.state.fn == TrainerFn.FITTING
            epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  " if fitting else ""
            print(f"{epoch}{what}  {values}{tail}", flush=True)
