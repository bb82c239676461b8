"""The run folder at the start of a run: claimed for one job, and set back to the state at the checkpoint."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from ssmpretrain.base.json_lines import drop_rows
from ssmpretrain.base.run_folder import RunFolder
from ssmpretrain.base.whole_files import move_aside_unless_regular, replace_text, replacing
from ssmpretrain.run.options.run_options import RunOptions
from ssmpretrain.run.start.lock import RunLock
from ssmpretrain.run.start.run_start import RunStart
from ssmpretrain.training.checkpoints.folder import by_step, point_last, rename, set_aside, step_of, sweep

_log = logging.getLogger(__name__)


def claim(options: RunOptions, start: RunStart, lock: RunLock) -> None:
    """Create the folder of the run, or move an earlier run in it aside, and lock it. Call it on one process.

    Args:
        options: Options of the run.
        start: Start of the run, with its checkpoint.
        lock: Lock of the folder. It is held already if the folder existed before.
    """
    if options.fresh and (moved := options.folder.move_aside()):
        _log.info("earlier run moved to %s", moved)
        lock.release()
    options.folder.prepare(start.step)
    lock.take()


class FolderAtStart(Callback):
    """Set the folder of the run back to the state at its checkpoint. Only rank 0 changes files.

    It waits until all ranks have met, because each rank reads the folder before that. It renames a checkpoint only
    after all ranks have loaded it.

    Args:
        options: Options of the run.
        start: Start of the run, with its checkpoint.
    """

    def __init__(self, options: RunOptions, start: RunStart) -> None:
        self.options, self.start = options, start

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero:
            rewind(self.options.folder, self.start)
            note_settings(self.options.folder, self.options.settings)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            name_by_step(self.options.folder, self.start)


def rewind(folder: RunFolder, start: RunStart) -> None:
    """Set the folder back to the state at the checkpoint.

    Later checkpoints are set aside. Later rows of metrics are dropped, because the run will log these steps again.

    Args:
        folder: Folder of the run.
        start: Start of the run, with its checkpoint.
    """
    found = start.found
    for place in (folder.path, folder.checkpoints, folder.plots):
        sweep(place)
    if found.run_without:
        for path in (folder.metrics, folder.bad_samples):  # the first epoch starts again, perhaps on repaired data
            if os.path.lexists(path):
                path.rename(_unused(path))
    if not found.in_folder or found.path is None:
        return
    later = [path for path in by_step(folder.checkpoints) if (step_of(path) or 0) > start.step]
    damaged = [one.path for one in found.damaged if os.path.lexists(one.path)]
    for path in dict.fromkeys([*later, *damaged]):
        if path != found.path:  # the other ranks still have to read that one
            _log.info("%s set aside as %s", path, set_aside(path).name)
    if found.path != folder.last_checkpoint:
        _link_newest(folder)
    drop_rows(folder.metrics, start.step)


def note_settings(folder: RunFolder, settings: str) -> None:
    """Write the configuration of this start to config.yaml, and keep an earlier different one as config.N.yaml."""
    path = folder.config
    move_aside_unless_regular(path)
    if path.exists() and (earlier := path.read_bytes()) != settings.encode():
        with replacing(_unused(path)) as copy:
            copy.write(earlier)
    replace_text(path, settings)


def name_by_step(folder: RunFolder, start: RunStart) -> None:
    """Rename the checkpoint that a run continues from after its step. Call it on one process, after all have read it.

    The checkpoint has another name if a person has renamed it, or if an older version wrote only `last.ckpt`.
    """
    path, step = start.found.path, start.step
    if not start.found.in_folder or path is None or step_of(path) == step or path.parent != folder.checkpoints:
        return
    renamed = rename(path, step)
    if renamed == path and (step_of(path) or 0) > step:  # a copy of an existing checkpoint, named after a later step
        renamed = set_aside(path)
    if renamed != path:
        _log.info("%s is of step %s and now called %s", path, f"{step:,}", renamed.name)
    _link_newest(folder)


def _link_newest(folder: RunFolder) -> None:
    newest = by_step(folder.checkpoints)
    if newest:
        point_last(newest[0])
    elif folder.last_checkpoint.is_symlink():  # it points to a checkpoint that was set aside
        folder.last_checkpoint.unlink()


def _unused(path: Path) -> Path:
    """Return `NAME.N.SUFFIX` beside a file, with the first free number N from 1 on."""
    number = 1
    while os.path.lexists(target := path.with_name(f"{path.stem}.{number}{path.suffix}")):
        number += 1
    return target
