"""A steady run whose data do not come, with a signal while they are waited for.

As a program, `torchrun ... stalled_run.py FOLDER RANK`, data of RANK stop in the second epoch, and the other ranks
wait for its gradients; each rank writes its exit code to FOLDER/stopped-NUMBER.json.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import steady_run
from lightning.pytorch import Trainer
from steady_run import Data, fit

from ssmpretrain.base import ranks


class _Loader:
    def __init__(self, loader: Any, change: Callable[[Any], Iterator[Any]]) -> None:
        self.loader, self.change = loader, change

    def __iter__(self) -> Iterator[Any]:
        return self.change(self.loader)

    def __len__(self) -> int:
        return len(self.loader)


class Stalled(Data):
    """Hands out some batches of training, or of a validation, and then none; a signal comes while one is waited for."""

    trainer: Trainer
    training = validation = 10**6
    epoch = 0
    signum = signal.SIGTERM
    seconds = 20.0

    def stall(self, batches: Iterable[Any], after: int) -> Iterator[Any]:
        for number, batch in enumerate(batches):
            if number == after and self.trainer.current_epoch >= self.epoch:
                threading.Timer(0.1, os.kill, (os.getpid(), self.signum)).start()
                time.sleep(self.seconds)
            yield batch

    def train_dataloader(self) -> Any:
        return _Loader(super().train_dataloader(), lambda batches: self.stall(batches, self.training))

    def val_dataloader(self) -> Any:
        return _Loader(super().val_dataloader(), lambda batches: self.stall(batches, self.validation))


def stalling(**places: Any) -> type[Data]:
    """A class of such data, under the name that a checkpoint has for their position."""
    return type("Data", (Stalled,), places)


def main(folder: Path, rank: int) -> None:
    """Stop a run while one rank waits for data."""
    steady_run.Data = stalling(training=2, epoch=1) if int(os.environ["RANK"]) == rank else Data
    stopped = fit(folder)
    (folder / f"stopped-{os.environ['RANK']}.json").write_text(json.dumps(stopped.code))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    ranks.leave()
