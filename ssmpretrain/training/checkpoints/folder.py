"""The folder of a run's checkpoints: their names, the newest one that can be trusted, and the link to it.

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
    """Return the file name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:09d}.ckpt"


def step_of(path: Path) -> int | None:
    """Return the optimizer steps before a checkpoint, by its name; None for another name."""
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else None


def by_step(folder: Path) -> list[Path]:
    """Return the checkpoints that are named by their step, newest first."""
    steps = {path: step_of(path) for path in folder.glob("step-*.ckpt")}
    return sorted((path for path, step in steps.items() if step is not None), key=lambda p: steps[p] or 0, reverse=True)


def all_newest_first(folder: Path) -> list[Path]:
    """Return every checkpoint that a run can continue from, newest first.

    Older versions wrote `last.ckpt` alone, as a file. If no file has a name of ours, those count that somebody renamed.
    """
    ours, last = by_step(folder), folder / LAST
    if last.exists() and not last.is_symlink():
        ours.append(last)
    return ours or sorted(path for path in folder.glob("*.ckpt") if path != last and path.is_file())


def newest_good(folder: Path) -> tuple[Path | None, tuple[tuple[Path, str], ...]]:
    """Return the newest checkpoint that can be trusted, if there is one, and the newer ones that are damaged.

    Each damaged one comes with the reason. Checkpoints older than the first good one are not read, unless a person has
    renamed that: a later one may come under another name.
    """
    damaged: list[tuple[Path, str]] = []
    good: list[tuple[int, bool, Path]] = []
    for path in all_newest_first(folder):
        if (what := damage(path)) is not None:
            damaged.append((path, what))
            continue
        step = written_at(path)
        if step < 0 and step_of(path) is None:
            continue  # weights that a person has put there
        good.append((step, step == step_of(path), path))
        if step == step_of(path):
            break
    return max(good)[-1] if good else None, tuple(damaged)


def damage(path: Path) -> str | None:
    """Return the damage of a checkpoint in a few words; None if it is whole.

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
    """Return the optimizer steps before a good checkpoint, whatever its name is now; -1 if it does not say.

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
    """Read a checkpoint: all of a file; of a folder everything outside its shards (no weights, no moments).

    Raises:
        ValueError: If it cannot be read.
    """
    return rest_of(path, read_content) if Path(path).is_dir() else read_content(path)


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
    """Rename a checkpoint together with its checksum; whatever has that name is deleted."""
    remove(target)
    path.rename(target)
    if sidecar(path).is_file():
        sidecar(path).replace(sidecar(target))


def sweep(folder: Path) -> None:
    """Delete the leftovers of a killed process: unfinished files, and checksums without a file."""
    for path in folder.glob(PARTIAL.format("*")):
        remove(path)
    for path in folder.glob("step-*.ckpt.sha256"):
        if not path.with_suffix("").exists() and path.is_file():
            path.unlink()
