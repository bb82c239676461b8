"""The folder of a run's checkpoints: their names, the newest one that can be trusted, and the link to it.

A checkpoint is named `step-000041237.ckpt`. It is a file with a sidecar, or a folder if the run is sharded. `last.ckpt`
is a link to the newest checkpoint.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ssmpretrain.base.whole_files import PARTIAL, partial, sync_folder
from ssmpretrain.encoders.weights.content import contents_of, read_content, read_without_sidecar, rest_of
from ssmpretrain.encoders.weights.on_disk import contradiction, parts_in, read_sidecar, sidecar

_log = logging.getLogger(__name__)
LAST = "last.ckpt"
_STEP = re.compile(r"step-(\d{9,})\.ckpt")


def name_of(step: int) -> str:
    """Return the file name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:09d}.ckpt"


def step_of(path: Path) -> int | None:
    """Return the optimizer steps that the name of a checkpoint gives; None for any other name."""
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else None


def by_step(folder: Path) -> list[Path]:
    """Return the checkpoints that are named by their step, newest first."""
    steps = {path: step_of(path) for path in folder.glob("step-*.ckpt")}
    return sorted((path for path, step in steps.items() if step is not None), key=lambda p: steps[p] or 0, reverse=True)


def all_newest_first(folder: Path) -> list[Path]:
    """Return every checkpoint that a run can continue from, newest first.

    Older versions wrote only a file `last.ckpt`. If no checkpoint is named by its step, all other `.ckpt` files count,
    because a person may have renamed them.
    """
    ours, last = by_step(folder), folder / LAST
    if last.exists() and not last.is_symlink():
        ours.append(last)
    return ours or sorted(path for path in folder.glob("*.ckpt") if path != last and path.is_file())


class Inspected(NamedTuple):
    """Result of `inspect`.

    Attributes:
        path: The checkpoint.
        step: Optimizer steps before it, also if a person has renamed it; -1 if it is damaged or names no step.
        damage: The damage in a few words; None if the checkpoint is whole.
    """

    path: Path
    step: int = -1
    damage: str | None = None


def inspect(path: Path) -> Inspected:
    """Check that a checkpoint is whole, and find its step.

    A file with a sidecar is compared with the sidecar. A file without one is read in full and compared with the
    checksums inside. A folder must hold all of its parts.
    """
    is_folder, files = path.is_dir(), [path]
    noted = content = None
    try:
        files = parts_in(path) if is_folder else files
    except ValueError as error:
        return Inspected(path, damage=f"unfinished: {error}")
    for file in files:
        try:
            if not stat.S_ISREG(file.stat().st_mode):
                damage: str | None = "no regular file"
            elif (noted := read_sidecar(file)) is not None:
                damage = contradiction(file)
            else:
                content, damage = read_without_sidecar(file)
        except FileNotFoundError:
            damage = "gone"
        except OSError as error:
            damage = f"cannot be read: {error.strerror or error}"
        if damage is not None:
            return Inspected(path, damage=f"{file.name}: {damage}" if is_folder else damage)
    # The sidecar keeps the name that the file was written under; a file without one holds its step.
    step = step_of(path) or 0 if is_folder else step_of(Path(noted.name)) if noted else None
    if step is None:
        content = contents_of(path, files)[0] if content is None else content
        step = content.get("global_step") if isinstance(content, dict) else None
    return Inspected(path, step if isinstance(step, int) else -1)


def newest_good(folder: Path) -> tuple[Path | None, tuple[Inspected, ...]]:
    """Find the newest whole checkpoint of a folder.

    Checkpoints older than the first whole one are not read. If a person has renamed that one, the search goes on,
    because a later checkpoint may have another name.

    Returns:
        The checkpoint, or None if there is no whole one; and the damaged checkpoints that were inspected before it.
    """
    damaged: list[Inspected] = []
    good: list[tuple[int, bool, Path]] = []
    for path in all_newest_first(folder):
        named, found = step_of(path), inspect(path)
        if found.damage is not None:
            damaged.append(found)
        elif found.step >= 0 or named is not None:  # else it holds weights that a person has put there
            good.append((found.step, found.step == named, path))
            if found.step == named:
                break
    return max(good)[-1] if good else None, tuple(damaged)


def read_state(path: str | Path, *, is_inspected: bool = False) -> Any:
    """Read a whole checkpoint file, or the parts of a checkpoint folder except the shards (weights and moments).

    Args:
        path: The checkpoint.
        is_inspected: Whether `inspect` has found it whole, so that its checksum need not be computed again.

    Raises:
        ValueError: If the checkpoint cannot be read.
    """
    read = _read_inspected if is_inspected else read_content
    return rest_of(path, read) if Path(path).is_dir() else read(path)


def _read_inspected(path: str | Path) -> Any:
    return contents_of(Path(path), [Path(path)])[0]


def point_last(newest: Path) -> None:
    """Make `last.ckpt` beside `newest` a relative link to it, or a copy if the file system has no links."""
    last, waiting = newest.with_name(LAST), partial(newest.with_name(LAST))
    waiting.unlink(missing_ok=True)
    ways: tuple[Callable[[], object], ...] = (
        lambda: waiting.symlink_to(newest.name),
        lambda: waiting.hardlink_to(newest),
        lambda: shutil.copyfile(newest, waiting),
    )
    for way in ways:
        try:
            way()
        except OSError:
            if way is ways[-1]:
                raise
        else:
            break
    if last.is_dir() and not last.is_symlink():  # a person may want its content
        _log.info("%s set aside as %s", last, set_aside(last).name)
    waiting.replace(last)
    sync_folder(newest.parent)


def remove(path: Path) -> None:
    """Delete a checkpoint and its sidecar."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    beside = sidecar(path)
    if not beside.is_dir() or beside.is_symlink():
        beside.unlink(missing_ok=True)


def keep_newest(folder: Path, keep: int) -> None:
    """Delete the checkpoints of all but the `keep` highest steps."""
    for path in by_step(folder)[keep:]:
        remove(path)


def set_aside(path: Path) -> Path:
    """Rename a checkpoint so that no run continues from it; return its new path."""
    target = path.with_name(path.name + ".aside")
    _move(path, target)
    return target


def rename(path: Path, step: int) -> Path:
    """Give a checkpoint the name of its step; return its new path, or the old one if another has that name."""
    target = path.with_name(name_of(step))
    if path == target or os.path.lexists(target):
        return path
    _move(path, target)
    return target


def _move(path: Path, target: Path) -> None:
    """Rename a checkpoint together with its sidecar; delete anything that has the new name already."""
    remove(target)
    path.rename(target)
    if sidecar(path).is_file():
        sidecar(path).replace(sidecar(target))


def sweep(folder: Path) -> None:
    """Delete the leftovers of a killed process: unfinished files, and sidecars without a file."""
    for path in folder.glob(PARTIAL.format("*")):
        remove(path)
    for path in folder.glob("step-*.ckpt.sha256"):
        if not path.with_suffix("").exists() and path.is_file():
            path.unlink()
