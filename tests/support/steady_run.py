"""A small run that depends on its batches' numbers alone, and a way to signal it at one place.

As a program, `torchrun ... steady_run.py FOLDER`, it is stopped at each of PLACES by a signal to rank 1, continued, and
compared with a run that was not stopped; each rank writes what it saw to FOLDER/RANK.json.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader, Sampler

from ssmpretrain.base import ranks
from ssmpretrain.base.run_folder import RunFolder
from ssmpretrain.callbacks.ema import EMA
from ssmpretrain.training.checkpoints.exact_resume import ExactResume
from ssmpretrain.training.checkpoints.saving import Checkpoints
from ssmpretrain.training.stopping.preemption import Preemption, watched

BATCHES, VALIDATION = 6, 3  # of an epoch


class Rest(Sampler[int]):
    """The batches of an epoch that are not trained yet."""

    def __init__(self) -> None:
        self.start = 0

    def __iter__(self) -> Iterator[int]:
        start, self.start = self.start, 0
        return iter(range(start, BATCHES))

    def __len__(self) -> int:
        return BATCHES


class Data(LightningDataModule):
    """Batches that depend on their number alone, and a position that counts trained ones."""

    def __init__(self) -> None:
        super().__init__()
        self.rest = Rest()
        self.items = torch.randn(BATCHES, 4, generator=torch.Generator().manual_seed(0))

    def train_dataloader(self) -> Any:
        return DataLoader(self.items, batch_size=None, sampler=self.rest)

    def val_dataloader(self) -> Any:
        return DataLoader(torch.ones(VALIDATION + ranks.rank(), 4), batch_size=None)

    def state_dict(self) -> dict[str, Any]:
        loop = self.trainer.fit_loop
        under_way = loop.epoch_progress.current.processed < loop.epoch_progress.current.started
        return {"trained": loop.epoch_loop.batch_progress.current.processed if under_way else 0}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rest.start = state["trained"]


class Model(LightningModule):
    """Four weights, and a diary of what it did."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4))
        self.losses: dict[int, float] = {}  # by batches before
        self.validated: dict[int, list[int]] = {}  # by steps before

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = (self.weight * batch).sum().square() - self.weight[0]
        self.losses[self.trainer.fit_loop.total_batch_idx] = loss.item()
        self.log("train/loss", loss)
        return loss

    def on_validation_epoch_start(self) -> None:
        self.validated[self.trainer.global_step] = []

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.validated[self.trainer.global_step].append(batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class At(Callback):
    """Send this process signals at one place."""

    def __init__(self, hook: str, count: int, *signals: signal.Signals) -> None:
        self.hook, self.count, self.signals = hook, count, signals

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        def fire(*given: Any, **named: Any) -> None:
            self.count -= 1
            if self.count == 0:
                for signum in self.signals or (signal.SIGTERM,):
                    os.kill(os.getpid(), signum)

        setattr(self, self.hook, fire)


class OwnLoop(Callback):
    """Goes through batches of its own in a validation, as OnlineEvaluation does."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for number in watched(trainer, range(4 + ranks.rank())):
            pl_module.validated[trainer.global_step].append(number)
            for callback in trainer.callbacks:
                if isinstance(callback, At) and callback.hook == "in_own_loop":
                    callback.in_own_loop()


def fit(folder: Path, *callbacks: Callback, max_time: Any = None, saves: int | None = None, **options: Any) -> Model:
    """Start or continue the run in `folder`, which saves every `saves` steps."""
    model = Model()
    trainer = Trainer(
        accelerator="cpu", devices=int(os.environ.get("LOCAL_WORLD_SIZE", 1)), use_distributed_sampler=False,
        default_root_dir=folder, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[
            *callbacks, EMA(0.5), OwnLoop(), ExactResume(), Preemption(max_time),
            Checkpoints(saves, every_n_epochs=None),
        ],
        **{"max_epochs": 3, "num_sanity_val_steps": 0, **options},
    )  # fmt: skip
    last = RunFolder(folder).last_checkpoint
    model.trainer_used = trainer
    try:
        trainer.fit(model, Data(), ckpt_path=last if last.exists() else None)
    except SystemExit as left:
        model.code = left.code
    else:
        model.code = 0
    return model


PLACES = {
    "in the middle of an epoch": ("on_train_batch_start", 3),
    "in the last batch of an epoch": ("on_train_batch_start", BATCHES),
    "after an epoch": ("on_train_epoch_end", 1),
    "at the beginning of a validation": ("on_validation_start", 1),
    "in a validation": ("on_validation_batch_end", 2),
    "in the last batch of a validation": ("on_validation_batch_start", VALIDATION),
    "in a loop of a callback": ("in_own_loop", 2),
}


def main(folder: Path) -> None:
    """Stop a run of two ranks everywhere, and continue it."""
    whole = fit(folder / "whole")
    seen = {}
    for place, when in PLACES.items():
        stopped = fit(folder / place, *([At(*when)] if ranks.rank() == 1 else []))
        rest = fit(folder / place)
        seen[place] = {
            "codes": [stopped.code, rest.code],
            "stopped at": stopped.trainer_used.global_step,
            "losses are equal": stopped.losses | rest.losses == whole.losses,
            "batches trained": len(stopped.losses) + len(rest.losses),
            "validations are equal": stopped.validated | rest.validated == whole.validated,
            "weights are equal": torch.equal(rest.weight, whole.weight),
        }
    (folder / f"{ranks.rank()}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    ranks.leave()
