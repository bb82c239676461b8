"""Loader of planned batches, and the position of training in the plan."""

import os
import secrets
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from multiprocessing import connection, util
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from ssmpretrain.datamodules.order.plan import Stage


class BatchKey(NamedTuple):
    """Key of one batch: number `batch` of `rank` in `epoch`, and the stages that train this epoch."""

    epoch: int
    batch: int
    rank: int
    stages: tuple[Stage, ...]


class PlanSampler(DistributedSampler[BatchKey], SequentialSampler):
    """Sampler that yields the keys of the batches of an epoch, and counts the batches that went to training.

    Lightning calls `set_epoch` before each epoch. Without a Trainer, each iteration reads the next epoch. The class
    derives from a distributed and a sequential sampler, so that Lightning does not replace it.

    Args:
        num_batches: Returns the number of batches of this rank, from an epoch and the stages that train it.
        stage: The present ranks.
        rank: Number of this process.
        same: Whether every epoch repeats the batches and the augmentation of the first epoch.
    """

    def __init__(
        self, num_batches: Callable[[int, tuple[Stage, ...]], int], stage: Stage, rank: int, same: bool = False
    ) -> None:
        self._num_batches, self._stage, self._rank, self._same = num_batches, stage, rank, same
        self.epoch = 0
        self._earlier: tuple[Stage, ...] = ()  # other ranks that trained this epoch before
        self._handed = 0  # batches of this epoch, counted as if the present ranks had trained all of it
        self._before = 0  # samples trained in the epochs before
        self._begun = False

    def set_epoch(self, epoch: int) -> None:
        """Set the next epoch. It begins at the position of `load_state_dict` if that is in this epoch, else at 0."""
        if epoch != self.epoch:
            self._before += self._samples(self._handed)
        if epoch != self.epoch or self._begun:
            self.epoch, self._earlier, self._handed = epoch, (), 0
        self._begun = False

    def state_dict(self, in_flight: int = 0) -> dict[str, Any]:
        """Return the position in training, as plain numbers.

        Args:
            in_flight: Number of batches that were handed out but not trained yet.

        Returns:
            samples: Number of samples trained since the run began, copies counted.
            epoch: Number of the present epoch, or of the epoch that just ended.
            complete: Whether this epoch ended.
            stages: The ranks that have trained this epoch, and the number of their optimizer steps.
        """
        trained = self._handed - in_flight
        complete = trained >= len(self)
        steps = -(-trained // self._stage.accumulate) if complete else trained // self._stage.accumulate
        now = replace(self._stage, steps=steps - sum(stage.steps for stage in self._earlier))
        return {
            "samples": self._before + self._samples(trained),
            "epoch": self.epoch,
            "complete": complete,
            "stages": [asdict(stage) for stage in (*self._earlier, now)],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a position that `state_dict` returned.

        Raises:
            DataError: If the present ranks cannot divide the rest of an epoch that other ranks began.
        """
        stages = tuple(Stage(**stage) for stage in state["stages"])
        steps = sum(stage.steps for stage in stages)
        if replace(stages[-1], steps=0) == self._stage:
            stages = stages[:-1]  # the same ranks go on
        self._earlier = () if state["complete"] else tuple(stage for stage in stages if stage.steps)
        self.epoch, self._begun = state["epoch"], False
        self._handed = len(self) if state["complete"] else steps * self._stage.accumulate
        self._before = state["samples"] - self._samples(self._handed)

    def handed_out(self) -> None:
        """Count a batch that goes to training."""
        self._handed += 1

    @property
    def is_over(self) -> bool:
        """Whether all batches of the epoch were handed out."""
        return self._handed >= len(self)

    def __len__(self) -> int:
        return self._num_batches(self._planned, self._stages)

    def __iter__(self) -> Iterator[BatchKey]:  # type: ignore[override]
        if self._begun:  # nobody called `set_epoch`
            self.set_epoch(self.epoch + 1)
        self._begun = True
        for batch in range(self._handed, len(self)):
            yield BatchKey(self._planned, batch, self._rank, self._stages)

    @property
    def _planned(self) -> int:
        """Number of the epoch whose plan is read."""
        return 0 if self._same else self.epoch

    @property
    def _stages(self) -> tuple[Stage, ...]:
        return (*self._earlier, self._stage)

    def _samples(self, batches: int) -> int:
        """Return the number of samples in `batches` batches of every rank."""
        return batches * self._stage.world * self._stage.batch_size


class EpochLoader(DataLoader[Any]):
    """DataLoader of `PlannedBatches`. It counts the batches that go to training, and skips empty ones.

    The workers start with the first batch, because the epoch is not known earlier.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(self.sampler, PlanSampler):
                self.sampler.handed_out()
                if self.sampler.is_over:
                    self.dataset.end_pass()  # type: ignore[attr-defined]
            if batch is not None:
                yield batch


def begin_worker(worker: int) -> None:
    """Prepare a worker process before it reads: signals, and sockets for tensors."""
    heed_parent_alone()
    _use_sockets_without_files()


def _use_sockets_without_files() -> None:
    """Send tensors from a worker through abstract sockets, which have no file.

    Python's own sockets are files in the temporary folder. If somebody cleans this folder, the run would stop at the
    next batch; a killed run would leave the files behind.
    """
    if not util.abstract_sockets_supported:
        return
    sockets: Any = connection  # its type does not name the function
    usual = sockets.arbitrary_address

    def address(family: str) -> Any:
        return f"\0ssmpretrain-{os.getpid()}-{secrets.token_hex(8)}" if family == "AF_UNIX" else usual(family)

    sockets.arbitrary_address = address


def heed_parent_alone() -> None:
    """Make a worker ignore signals that its parent did not send; the parent answers signals to the whole job."""
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def wait() -> None:
        while True:
            received = signal.sigwaitinfo(signals)
            if received.si_signo == signal.SIGTERM and received.si_pid == os.getppid():
                os._exit(0)  # what torch's own handler does

    threading.Thread(target=wait, daemon=True).start()
