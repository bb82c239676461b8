"""A callback for recipes of tests."""

import os
import signal
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Die(Callback):
    """One rank kills itself before a step, the first time that the run comes there.

    Args:
        rank: Which.
        step: Optimizer steps before.
    """

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if (trainer.global_rank, trainer.global_step) == (self.rank, self.step):
            died = Path(trainer.default_root_dir) / f"died-{self.step}"
            if not died.exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
