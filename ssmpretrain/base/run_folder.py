"""Run folder: config.yaml, metrics.jsonl, environment.txt, checkpoints/, plots/, and JSON of results."""

from __future__ import annotations

import os
import platform
import socket
import sys
import tempfile
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.whole_files import append, naming

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_PACKAGES = ("ssmpretrain", "torch", "triton", "lightning", "timm", "torchvision", "webdataset", "numpy")


class RunFolder:
    """The paths of one run, all below `path`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.best = self.checkpoints / "best"
        self.plots = self.path / "plots"
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.txt"
        self.metrics = self.path / "metrics.jsonl"
        self.bad_samples = self.path / "bad_samples.jsonl"
        self.parameter_groups = self.path / "parameter_groups.txt"
        self.loss_plot = self.plots / "loss.png"
        self.reconstruction = self.plots / "reconstruction.png"
        self.predictions = self.plots / "predictions.png"
        self.similarity = self.plots / "similarity.png"
        self.neighbours = self.plots / "neighbours.png"
        self.components = self.plots / "pca.png"
        self.probe = self.path / "probe.json"
        self.detection = self.path / "detection.json"
        self.segmentation = self.path / "segmentation.json"

    @property
    def last_checkpoint(self) -> Path:
        """The link to the newest checkpoint of the run."""
        return self.checkpoints / "last.ckpt"

    def move_aside(self) -> Path | None:
        """Rename an existing run to `NAME.1`, `NAME.2`, ...; return the new path, or None if there was none."""
        if not os.path.lexists(self.path):
            return None
        number = 1
        while os.path.lexists(target := self.path.with_name(f"{self.path.name}.{number}")):
            number += 1
        return self.path.rename(target)

    def prepare(self, step: int = 0) -> None:
        """Create the folders, prove that they can be written to, and note in environment.txt where the run starts.

        Args:
            step: Number of optimizer steps that the run has taken.

        Raises:
            OSError: If a folder cannot be made or written to; its `filename` names it.
            UserError: See `check_links`.
        """
        self.check_links()
        for folder in (self.checkpoints, self.plots):
            folder.mkdir(parents=True, exist_ok=True)
            with naming(folder), tempfile.TemporaryFile(dir=folder):
                pass
        append(self.environment, _environment(step).encode())

    def check_links(self) -> None:
        """Refuse a folder of the run that is a link, because a run deletes files in its folders.

        Raises:
            UserError: If there is such a link.
        """
        for folder in (self.checkpoints, self.best, self.plots):
            if folder.is_symlink():
                raise UserError(
                    f"{folder}: a run writes and deletes files in its own folders alone; got a link to "
                    f"{os.readlink(folder)}. Remove it. To keep a run elsewhere, make the whole run folder a link."
                )


def takes_results(trainer: Trainer) -> bool:
    """Return whether a validation may write into the trainer's folder: within `fit`, or if the folder holds no run."""
    return trainer.state.fn == "fit" or not RunFolder(trainer.default_root_dir).config.exists()


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
