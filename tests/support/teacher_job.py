"""Trains an objective with a teacher on one, two and four ranks; prints, as JSON, how runs and ranks compare.

One process imports everything and forks the ranks.
"""

import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from forked_ranks import in_ranks
from lightning.pytorch import Callback, Trainer, seed_everything
from taught_run import Twin, TwoViews, fit

from ssmpretrain.encoders.weights.content import read_content
from ssmpretrain.training.checkpoints.files import CheckpointFiles
from ssmpretrain.training.ranks.fsdp import FSDP2

Arrays = dict[str, np.ndarray]
SAVED_AT = 3  # of 4 steps, two an epoch


class Watch(Callback):
    """Keep the state of the objective when training starts; write a checkpoint after an optimizer step."""

    def __init__(self, save: Path | None) -> None:
        self.save = save
        self.start: Arrays = {}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.start = state_of(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.save and trainer.global_step == SAVED_AT and (batch_idx + 1) % 2 == 0:
            trainer.save_checkpoint(self.save)


def state_of(model: Any) -> Arrays:
    """Copies of all tensors, with the rows of all ranks."""
    tensors = model.state_dict().items()
    return {name: np.array(one.full_tensor() if hasattr(one, "full_tensor") else one) for name, one in tensors}


def train(strategy: Any, world: int, *, resume: Path | None = None, save: Path | None = None) -> tuple[Arrays, Arrays]:
    """Train in this rank; return the states of the objective at the start and at the end."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    seed_everything(0, verbose=False)
    model, watch = Twin(clip_per_tensor=0.05), Watch(save)
    fit(
        Path(tempfile.mkdtemp()), model, watch, data=TwoViews(count=4), resume=resume, devices=world, strategy=strategy,
        plugins=[CheckpointFiles()], accumulate_grad_batches=2, use_distributed_sampler=False,
    )  # fmt: skip
    return watch.start, state_of(model)


def apart(ours: Arrays, theirs: Arrays) -> list[str]:
    """Names of the tensors that differ in any bit.

    Ranks have other running statistics of the student, of which a checkpoint holds those of rank 0.
    """
    names = [name for name in ours if not name.startswith("head.1.running")]
    assert ours.keys() == theirs.keys()
    return [name for name in names if not np.array_equal(ours[name], theirs[name])]


def interrupted(path: Path, strategy: Any) -> dict[str, Any]:
    """A run of two ranks saved within its second epoch, and what goes on from there, by the same and by other ranks."""
    (_, ours), (_, theirs) = in_ranks(2, train, strategy, 2, save=path)
    content = {name: value.numpy() for name, value in read_content(path)["state_dict"].items()}
    again = in_ranks(2, train, strategy, 2, resume=path)
    report: dict[str, Any] = {"ranks": apart(ours, theirs), "the same": [apart(ours, end) for _, end in again]}
    for world, other in ((1, "auto"), (2, "ddp"), (4, "fsdp2")):
        (start, _), *_ = in_ranks(world, train, other, world, resume=path)
        report[f"{other} on {world}"] = apart(content, start)
    report["teacher"] = float(sum(np.abs(ours[name]).sum() for name in sorted(ours) if name.startswith("teacher.")))
    return report


def main() -> None:
    strategies = {"ddp": "ddp", "fsdp2": "fsdp2", "fsdp2 in parts": FSDP2(sharded_checkpoints=True)}
    with tempfile.TemporaryDirectory() as folder:
        report = {name: interrupted(Path(folder) / f"{name}.ckpt", one) for name, one in strategies.items()}
    print("REPORT", json.dumps(report))


if __name__ == "__main__":
    main()
