"""Where a run begins: at its newest good checkpoint, at a file that was named, or at the start."""

from __future__ import annotations

import contextlib
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

from ssmpretrain.training.checkpoint_folder import (
    all_newest_first,
    by_step,
    damage,
    name_of,
    point_last,
    set_aside,
    step_of,
    sweep,
)
from ssmpretrain.training.run_folder import RunFolder
from ssmpretrain.training.whole_files import replace_text

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
        raise ValueError(f"{folder.path}: --fresh begins anew and --ckpt_path last goes on. Leave one of them out.")
    if fresh:
        return Beginning()
    damaged: list[tuple[Path, str]] = []
    for path in all_newest_first(folder.checkpoints):
        if (what := damage(path)) is None:
            return Beginning(path, continues=True, damaged=damaged)
        damaged.append((path, what))
    if damaged:
        raise ValueError(
            f"{folder.path}: no checkpoint of this run can be used: "
            + "; ".join(f"{path.name} ({what})" for path, what in damaged)
            + ". Put a good copy of one there, or start anew with --fresh."
        )
    if ckpt_path is not None:
        raise ValueError(f"{folder.last_checkpoint}: no such checkpoint. Leave --ckpt_path out to start a run there.")
    return Beginning(lost=folder.config.exists())


def _from_file(folder: RunFolder, path: Path, fresh: bool) -> Beginning:
    inside = path.resolve().is_relative_to(folder.path.resolve())
    if inside and fresh:
        raise ValueError(f"{folder.path}: --fresh moves the folder aside, and {path} with it. Leave one of them out.")
    if not inside and not fresh and all_newest_first(folder.checkpoints):
        raise ValueError(
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
    sweep(folder.checkpoints)
    if beginning.lost:
        for path in (folder.metrics, folder.bad_samples):  # the epoch begins again, perhaps with repaired data
            if path.exists():
                path.rename(unused(path))
    if not beginning.continues or beginning.checkpoint is None:
        return
    later = [path for path in by_step(folder.checkpoints) if (step_of(path) or 0) > step]
    damaged = [path for path, _ in beginning.damaged if path.exists()]
    for path in dict.fromkeys([*later, *damaged]):
        _log.info("%s set aside as %s", path, set_aside(path).name)
    _name_by_step(folder, step)
    _link_newest(folder)
    drop_rows(folder.metrics, step)


def _name_by_step(folder: RunFolder, step: int) -> None:
    """Give the only checkpoint of an older version, a file `last.ckpt`, the name that ours have."""
    last, named = folder.last_checkpoint, folder.checkpoints / name_of(step)
    if last.exists() and not last.is_symlink() and not named.exists():
        with contextlib.suppress(OSError):  # where there are no hard links it stays as it is
            named.hardlink_to(last)


def _link_newest(folder: RunFolder) -> None:
    newest = by_step(folder.checkpoints)
    if newest:
        point_last(newest[0])
    elif folder.last_checkpoint.is_symlink():  # to what was set aside
        folder.last_checkpoint.unlink()


def drop_rows(metrics: Path, step: int) -> None:
    """Drop the rows of `metrics.jsonl` that come after `step` optimizer steps, and an unfinished last line."""
    if not metrics.exists():
        return
    lines = metrics.read_text().splitlines(keepends=True)
    kept = [line for line in lines if _is_before(line, step)]
    if kept == lines:
        return
    replace_text(metrics, "".join(kept))


def _is_before(line: str, step: int) -> bool:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return False
    number = row.get("step")  # of the row after the first step it is 0
    return not isinstance(number, int) or number < step


def unused(path: Path) -> Path:
    """`NAME.1.SUFFIX` beside a file, or the first such number that is free."""
    number = 1
    while (target := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return target
