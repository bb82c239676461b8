"""Where a run begins: at its newest good checkpoint, at a file that was named, or at the start."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.json_lines import drop_rows
from ssmpretrain.base.run_folder import RunFolder
from ssmpretrain.training.checkpoints.folder import (
    all_newest_first,
    by_step,
    damage,
    point_last,
    rename,
    set_aside,
    step_of,
    sweep,
    written_at,
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Beginning:
    """Where a run begins.

    Attributes:
        checkpoint: What it goes on from; None at the start.
        continues: Whether that is a checkpoint of the run's own folder.
        damaged: Newer checkpoints that cannot be used, and why.
        lost: Whether the folder holds a run without a checkpoint.
    """

    checkpoint: Path | None = None
    continues: bool = False
    damaged: list[tuple[Path, str]] = field(default_factory=list)
    lost: bool = False


def find_beginning(folder: RunFolder, ckpt_path: str | None, fresh: bool) -> Beginning:
    """Decide where a run in `folder` begins; nothing is changed, so every rank can ask.

    Args:
        folder: Of the run.
        ckpt_path: None and "last" for the newest good checkpoint of the folder, or a file.
        fresh: Begin anew, whatever the folder holds.

    Raises:
        ValueError: If the folder holds checkpoints and none is good, there is none though "last" asks for one, or the
            arguments contradict each other.
    """
    if ckpt_path not in (None, "last"):
        return _from_file(folder, Path(str(ckpt_path)).expanduser(), fresh)
    if fresh and ckpt_path is not None:
        raise UserError(f"{folder.path}: --fresh begins anew and --ckpt_path last goes on. Leave one of them out.")
    if fresh:
        return Beginning()
    damaged: list[tuple[Path, str]] = []
    good: list[tuple[int, bool, Path]] = []
    for path in all_newest_first(folder.checkpoints):
        if (what := damage(path)) is not None:
            damaged.append((path, what))
            continue
        step = written_at(path)
        if step < 0 and step_of(path) is None:
            continue  # weights that a person has put there
        good.append((step, step == step_of(path), path))
        if step == step_of(path):  # else a person has renamed it, and a later one may come
            break
    if good:
        return Beginning(max(good)[-1], continues=True, damaged=damaged)
    if damaged:
        raise UserError(
            f"{folder.path}: no checkpoint of this run can be used: "
            + "; ".join(f"{path.name} ({what})" for path, what in damaged)
            + ". Put a good copy of one there, or start anew with --fresh."
        )
    if ckpt_path is not None:
        raise UserError(f"{folder.last_checkpoint}: no such checkpoint. Leave --ckpt_path out to start a run there.")
    return Beginning(lost=folder.config.exists())


def _from_file(folder: RunFolder, path: Path, fresh: bool) -> Beginning:
    inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder.path))
    if inside and fresh:
        raise UserError(f"{folder.path}: --fresh moves the folder aside, and {path} with it. Leave one of them out.")
    if inside and Path(os.path.realpath(path)).parent == Path(os.path.realpath(folder.checkpoints)):
        path = folder.checkpoints / os.path.basename(os.path.realpath(path))  # what last.ckpt means
    if not inside and not fresh and all_newest_first(folder.checkpoints):
        raise UserError(
            f"{folder.path}: the folder holds a run of its own, which {path} is not part of. Move that run aside with "
            "--fresh, or choose another folder with --run_dir."
        )
    return Beginning(path, continues=inside)


def take_over(folder: RunFolder, beginning: Beginning, step: int) -> None:
    """Bring the folder to the state that it had at the checkpoint; for one process, when all have read the folder.

    What comes later than the checkpoint is set aside (checkpoints) or dropped (rows of metrics: they come again).

    Args:
        folder: Of the run.
        beginning: See `find_beginning`.
        step: Optimizer steps before the checkpoint.
    """
    for place in (folder.path, folder.checkpoints, folder.plots):
        sweep(place)
    if beginning.lost:
        for path in (folder.metrics, folder.bad_samples):  # the epoch begins again, perhaps with repaired data
            if os.path.lexists(path):
                path.rename(unused(path))
    if not beginning.continues or beginning.checkpoint is None:
        return
    later = [path for path in by_step(folder.checkpoints) if (step_of(path) or 0) > step]
    damaged = [path for path, _ in beginning.damaged if os.path.lexists(path)]
    for path in dict.fromkeys([*later, *damaged]):
        if path != beginning.checkpoint:  # all ranks have yet to read it
            _log.info("%s set aside as %s", path, set_aside(path).name)
    if beginning.checkpoint != folder.last_checkpoint:
        _link_newest(folder)
    drop_rows(folder.metrics, step)


def settle(folder: RunFolder, beginning: Beginning, step: int) -> None:
    """Give the checkpoint that a run goes on from the name of its step; for one process, when all have read it.

    It has another where a person has renamed it, and where an older version wrote `last.ckpt` alone.
    """
    path = beginning.checkpoint
    if not beginning.continues or path is None or step_of(path) == step or path.parent != folder.checkpoints:
        return
    renamed = rename(path, step)
    if renamed == path and (step_of(path) or 0) > step:  # a copy of one that is there: no run shall go on from it
        renamed = set_aside(path)
    if renamed != path:
        _log.info("%s is of step %s and now called %s", path, f"{step:,}", renamed.name)
    _link_newest(folder)


def _link_newest(folder: RunFolder) -> None:
    newest = by_step(folder.checkpoints)
    if newest:
        point_last(newest[0])
    elif folder.last_checkpoint.is_symlink():  # to what was set aside
        folder.last_checkpoint.unlink()


def unused(path: Path) -> Path:
    """`NAME.1.SUFFIX` beside a file, or the first such number that is free."""
    number = 1
    while os.path.lexists(target := path.with_name(f"{path.stem}.{number}{path.suffix}")):
        number += 1
    return target
