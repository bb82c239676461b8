"""The checkpoints of a run: their names, which is the newest, which of them can be trusted.

A checkpoint is `step-000041237.ckpt`, a file with its sidecar or (of a sharded run) a folder. `last.ckpt` is a link to
the newest.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssmpretrain.base.whole_files import PARTIAL, partial, sync_folder
from ssmpretrain.encoders.weights.content import read_content, rest_of
from ssmpretrain.encoders.weights.on_disk import contradiction, parts_in, read_sidecar, sidecar

_log = logging.getLogger(__name__)
LAST = "last.ckpt"
_STEP = re.compile(r"step-(\d{9,})\.ckpt")


def name_of(step: int) -> str:
    """File name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:09d}.ckpt"


def step_of(path: Path) -> int | None:
    """Optimizer steps before this checkpoint, by its name; None for another name."""
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else None


def by_step(folder: Path) -> list[Path]:
    """The checkpoints named by their step, newest first."""
    steps = {path: step_of(path) for path in folder.glob("step-*.ckpt")}
    return sorted((path for path, step in steps.items() if step is not None), key=lambda p: steps[p] or 0, reverse=True)


def all_newest_first(folder: Path) -> list[Path]:
    """Every checkpoint that a run can go on from, newest first; older versions wrote `last.ckpt` alone, as a file.

    Where none has a name of ours, those that somebody has renamed.
    """
    ours, last = by_step(folder), folder / LAST
    if last.exists() and not last.is_symlink():
        ours.append(last)
    return ours or sorted(path for path in folder.glob("*.ckpt") if path != last and path.is_file())


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None where nothing is.

    A file with a sidecar is compared with that. Any other is read in full and compared with the checksums inside. Of a
    folder, all parts have to be there.
    """
    if path.is_dir():
        return _damaged_part(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return "no regular file"
        return _unreadable(path) if read_sidecar(path) is None else contradiction(path)
    except FileNotFoundError:
        return "gone"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def _damaged_part(folder: Path) -> str | None:
    try:
        parts = parts_in(folder)
    except ValueError as error:
        return f"unfinished: {error}"
    return next((f"{part.name}: {what}" for part in parts if (what := damage(part))), None)


def written_at(path: Path) -> int:
    """Optimizer steps before a good checkpoint, whatever a person has called it; -1 where it does not say.

    Its sidecar has the name that it was written under; a file without says it itself.
    """
    if path.is_dir():
        return step_of(path) or 0
    said = read_sidecar(path)
    step = step_of(Path(said.name)) if said else None
    return step if step is not None else _step_in(read_content(path))


def _step_in(content: Any) -> int:
    step = content.get("global_step")
    return step if isinstance(step, int) else -1


def _unreadable(path: Path) -> str | None:
    if path.stat().st_size == 0:
        return "empty"
    try:
        content = read_content(path)
        if zipfile.is_zipfile(path) and (entry := zipfile.ZipFile(path).testzip()):
            return f"{entry} in it is damaged, and there is no good .sha256"
    except (ValueError, zipfile.BadZipFile):
        return "no checkpoint, or a part of one"
    return None if isinstance(content, dict) and content.keys() & {"state_dict", "shards"} else "no checkpoint"


def read_state(path: str | Path) -> Any:
    """What a checkpoint says: all of a file, and of a folder what is not in its shards (no weights, no moments).

    Raises:
        ValueError: If it cannot be read.
    """
    return rest_of(path, read_content) if Path(path).is_dir() else read_content(path)


def point_last(newest: Path) -> None:
    """Make `last.ckpt` beside `newest` mean that: a relative link, or where links are not possible the same content."""
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
    if last.is_dir() and not last.is_symlink():  # what is in it, a person may want
        _log.info("%s set aside as %s", last, set_aside(last).name)
    waiting.replace(last)
    sync_folder(newest.parent)


def remove(path: Path) -> None:
    """Delete a checkpoint and what lies beside it."""
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
    """Rename a checkpoint so that no run goes on from it; return its new path."""
    target = path.with_name(path.name + ".aside")
    _move(path, target)
    return target


def rename(path: Path, step: int) -> Path:
    """Give a checkpoint the name of its step; return its new path, or its own where another has that name."""
    target = path.with_name(name_of(step))
    if path == target or os.path.lexists(target):
        return path
    _move(path, target)
    return target


def _move(path: Path, target: Path) -> None:
    """Rename a checkpoint, and its checksum with it, in the place of what has that name."""
    remove(target)
    path.rename(target)
    if sidecar(path).is_file():
        sidecar(path).replace(sidecar(target))


def sweep(folder: Path) -> None:
    """Delete what a killed process left behind: parts of files, checksums of files that never came."""
    for path in folder.glob(PARTIAL.format("*")):
        remove(path)
    for path in folder.glob("step-*.ckpt.sha256"):
        if not path.with_suffix("").exists() and path.is_file():
            path.unlink()
