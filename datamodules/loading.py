"""Data sets that know which epoch it is, in every worker, and the loader that tells them."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import distributed
from torch.utils.data import DataLoader


class EpochClock:
    """The epoch, the batches of it already trained, and the rank, in memory that worker processes share.

    Set in the main process before workers are asked for an epoch; read by a worker when it begins one. A process
    group exists only in the main process, so the rank is passed on here too.
    """

    def __init__(self) -> None:
        self._shared = torch.tensor([0, 0, 0, 1]).share_memory_()  # type: ignore[no-untyped-call]  # epoch, batches trained, rank, world
        self._begun = False
        self.trainer_epoch: Callable[[], int | None] | None = None  # set by the data module, in the main process only

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "trainer_epoch": None}

    @property
    def epoch(self) -> int:
        """The epoch under way, or the next one."""
        return int(self._shared[0])

    def set(self, epoch: int, batches_trained: int = 0) -> None:
        """Say which epoch comes next, and how many batches of this rank to leave out at its start."""
        self._shared[0], self._shared[1] = epoch, batches_trained
        self._begun = False

    def begin(self) -> None:
        """Start an epoch: the Trainer's, else the one that was set, else the next."""
        trainer_epoch = self.trainer_epoch() if self.trainer_epoch is not None else None
        if trainer_epoch is not None and trainer_epoch != self.epoch:
            self.set(trainer_epoch)
        elif trainer_epoch is None and self._begun:
            self.set(self.epoch + 1)
        elif self._begun:
            self.set(self.epoch)
        self._begun = True
        self._shared[2], self._shared[3] = rank_and_world()

    def read(self) -> tuple[int, int, int, int]:
        """(epoch, batches trained, rank, world), in any process."""
        epoch, trained, rank, world = self._shared.tolist()
        return epoch, trained, rank, world


class EpochLoader(DataLoader[Any]):
    """A DataLoader that starts its data set's clock each time it is iterated."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.dataset.clock.begin()  # type: ignore[attr-defined]
        return super().__iter__()


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without torch.distributed."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
