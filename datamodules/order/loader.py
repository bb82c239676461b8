"""The loader of planned batches, and its position in training."""

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
    """Key of a batch that a worker is to read: number `batch` of `rank`, in an epoch that these stages train."""

    epoch: int
    batch: int
    rank: int
    stages: tuple[Stage, ...]


class PlanSampler(DistributedSampler[BatchKey], SequentialSampler):
    """Asks for the batches of an epoch one by one, and knows how many of them went to training.

    Lightning says by `set_epoch` which epoch comes; without a Trainer it is the next one each time. (It is called a
    distributed and a sequential sampler so that Lightning does not put one of its own in its place.)

    Args:
        num_batches: Batches of this rank in an epoch that these stages train.
        stage: The ranks of now.
        rank: This process's.
        same: Whether every epoch reads the batches of the first one, augmented as there.
    """

    def __init__(
        self, num_batches: Callable[[int, tuple[Stage, ...]], int], stage: Stage, rank: int, same: bool = False
    ) -> None:
        self._num_batches, self._stage, self._rank, self._same = num_batches, stage, rank, same
        self.epoch = 0
        self._earlier: tuple[Stage, ...] = ()  # other ranks that trained this epoch before
        self._handed = 0  # batches of this epoch, counted as if the ranks of now had trained all of it
        self._before = 0  # samples trained in the epochs before
        self._begun = False

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next: it begins where `load_state_dict` said if that was of it, else at its start."""
        if epoch != self.epoch:
            self._before += self._samples(self._handed)
        if epoch != self.epoch or self._begun:
            self.epoch, self._earlier, self._handed = epoch, (), 0
        self._begun = False

    def state_dict(self, in_flight: int = 0) -> dict[str, Any]:
        """Return the position in training, as plain numbers.

        Args:
            in_flight: Batches that were handed out and are not trained yet.

        Returns:
            samples: Trained since the run began, copies counted.
            epoch: The one under way, or the one that just ended.
            complete: Whether it ended.
            stages: The ranks that trained it so far, and the optimizer steps that they took.
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
        """Go on at a position.

        Raises:
            DataError: If the ranks of now cannot share out what those before them left of an epoch.
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
        if self._begun:  # nobody said which epoch it is
            self.set_epoch(self.epoch + 1)
        self._begun = True
        for batch in range(self._handed, len(self)):
            yield BatchKey(self._planned, batch, self._rank, self._stages)

    @property
    def _planned(self) -> int:
        """The epoch whose plan is read."""
        return 0 if self._same else self.epoch

    @property
    def _stages(self) -> tuple[Stage, ...]:
        return (*self._earlier, self._stage)

    def _samples(self, batches: int) -> int:
        """Return the number of samples in so many batches of every rank."""
        return batches * self._stage.world * self._stage.batch_size


class EpochLoader(DataLoader[Any]):
    """A DataLoader of `PlannedBatches` whose workers begin when the first batch is asked for.

    Only then everybody knows the epoch.
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
    """Prepare a worker process, before it reads."""
    heed_parent_alone()
    _use_sockets_without_files()


def _use_sockets_without_files() -> None:
    """Hand tensors over by sockets that have no file, in a worker.

    Python's lie in the temporary folder: cleaning it would end the run at the next batch, and a kill leaves them there.
    """
    if not util.abstract_sockets_supported:
        return
    sockets: Any = connection  # its type does not name the function
    usual = sockets.arbitrary_address

    def address(family: str) -> Any:
        return f"\0ssmpretrain-{os.getpid()}-{secrets.token_hex(8)}" if family == "AF_UNIX" else usual(family)

    sockets.arbitrary_address = address


def heed_parent_alone() -> None:
    """Let nobody but the parent end a worker, as a signal to the whole job is the parent's to answer."""
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def wait() -> None:
        while True:
            received = signal.sigwaitinfo(signals)
            if received.si_signo == signal.SIGTERM and received.si_pid == os.getppid():
                os._exit(0)  # what torch's own handler does

    threading.Thread(target=wait, daemon=True).start()
