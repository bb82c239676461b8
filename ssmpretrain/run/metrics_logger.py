"""The logger of a run: one row of metrics.jsonl for every logged step."""

from __future__ import annotations

import json
import math
import time
from argparse import Namespace
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from ssmpretrain.base.json_lines import RowFile
from ssmpretrain.base.run_folder import RunFolder


class LogEveryEpoch(Callback):
    """Log at least once an epoch if an epoch has fewer batches than the trainer's logging interval."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        interval = min(trainer.log_every_n_steps, int(trainer.num_training_batches))  # type: ignore[attr-defined]
        trainer.log_every_n_steps = max(1, interval)  # type: ignore[attr-defined]


class MetricsLogger(Logger):
    """Append every logged step to `metrics.jsonl`: one JSON object per line with step, time and the metrics.

    A value that is not finite is written as null, because JSON cannot express it. If the disk is full, the rows wait in
    memory, and training goes on.

    Args:
        folder: Folder of the run.
    """

    def __init__(self, folder: RunFolder) -> None:
        super().__init__()
        self.folder = folder
        self._last: dict[str, Any] = {}
        self._rows = RowFile(folder.metrics)

    @property
    def name(self) -> str:
        return self.folder.path.name

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.folder.path)

    @property
    def log_dir(self) -> str:
        return self.save_dir

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing, as config.yaml holds the hyper-parameters."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        if self._last == (row := {"step": step, **finite}):
            return  # the trainer logs a step again that was logged before its checkpoint
        self._last = row
        self._rows.append([json.dumps({"step": step, "time": round(time.time(), 3), **finite})])
