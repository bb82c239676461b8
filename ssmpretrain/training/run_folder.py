"""One folder per run: config.yaml, metrics.jsonl, environment.txt, checkpoints/, plots/; probe.json of a probe."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import socket
import sys
import time
from argparse import Namespace
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from ssmpretrain.training.whole_files import naming

_log = logging.getLogger(__name__)
_PACKAGES = ("ssmpretrain", "torch", "triton", "lightning", "timm", "torchvision", "webdataset", "numpy")


class RunFolder:
    """Paths of one run below `path`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.plots = self.path / "plots"
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.txt"
        self.metrics = self.path / "metrics.jsonl"
        self.bad_samples = self.path / "bad_samples.jsonl"
        self.parameter_groups = self.path / "parameter_groups.txt"
        self.loss_plot = self.plots / "loss.png"
        self.reconstruction = self.plots / "reconstruction.png"
        self.similarity = self.plots / "similarity.png"
        self.probe = self.path / "probe.json"

    @property
    def last_checkpoint(self) -> Path:
        """Where the newest checkpoint of the run lies."""
        return self.checkpoints / "last.ckpt"

    def move_aside(self) -> Path | None:
        """Rename an existing run to `NAME.1`, `NAME.2`, ...; return the new path, or None if there was none."""
        if not self.path.exists():
            return None
        number = 1
        while (target := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        return self.path.rename(target)

    def prepare(self, step: int = 0) -> None:
        """Create the folders, prove that they can be written to, and note where the run goes on from `step`.

        Raises:
            OSError: If they cannot; its `filename` says where.
        """
        for folder in (self.checkpoints, self.plots):
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".writable"
            probe.touch()
            probe.unlink()
        with naming(self.environment), self.environment.open("a") as file:
            file.write(_environment(step))


def takes_results(trainer: Trainer) -> bool:
    """Whether a validation may write into the trainer's folder: one of `fit`, or any where the folder holds no run."""
    return trainer.state.fn == TrainerFn.FITTING or not RunFolder(trainer.default_root_dir).config.exists()


class LogEveryEpoch(Callback):
    """Log at least once an epoch, where an epoch has fewer batches than the trainer's logging interval."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        interval = min(trainer.log_every_n_steps, int(trainer.num_training_batches))  # type: ignore[attr-defined]
        trainer.log_every_n_steps = max(1, interval)  # type: ignore[attr-defined]


class MetricsLogger(Logger):
    """Append every logged step to `metrics.jsonl`: one object a line with step, time and the metrics.

    A value that is not finite is written as null, because JSON has no other word for it. On a full disk the rows wait
    in memory, and training goes on.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: RunFolder) -> None:
        super().__init__()
        self.folder = folder
        self._last: dict[str, Any] = {}
        self._waiting: list[str] = []

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
        """Nothing to do: config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        if self._last == (row := {"step": step, **finite}):
            return  # a step that was logged before its checkpoint is logged again by the trainer
        self._last = row
        self._waiting.append(json.dumps({"step": step, "time": round(time.time(), 3), **finite}) + "\n")
        path = self.folder.metrics
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("a") as file:  # opened anew for each line: a killed run loses none
                file.write("".join(self._waiting))
        except OSError as error:
            if path.exists():
                os.truncate(path, size)  # no half a line
            if len(self._waiting) == 1:
                _log.warning("%s: not written: %s; its rows wait until they can be", path, error.strerror)
        else:
            self._waiting.clear()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a `metrics.jsonl`; a last line that a killed run left unfinished is dropped."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _environment(step: int) -> str:
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    lines = [f"started {now}, step {step:,}, host {socket.gethostname()}"]
    lines += [f"python {platform.python_version()}", f"platform {platform.platform()}"]
    for package in _PACKAGES:
        try:
            lines.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package} not installed as a package")
    lines.append(f"threads {torch.get_num_threads()}")
    lines += [f"gpu {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    lines.append("command " + " ".join(sys.argv))
    return "\n".join(lines) + "\n\n"
