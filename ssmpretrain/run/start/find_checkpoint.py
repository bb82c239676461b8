"""The checkpoint that a command means: the newest good one of the run's folder, a file that it names, or none."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.run_folder import RunFolder
from ssmpretrain.run.options.run_options import RunOptions
from ssmpretrain.training.checkpoints.folder import all_newest_first, newest_good


@dataclass(frozen=True)
class FoundCheckpoint:
    """The checkpoint that a command means, if there is one.

    Attributes:
        path: The checkpoint; None where training or validation begins without one.
        in_folder: Whether it lies in the run's own folder, so that the run continues there.
        damaged: Newer checkpoints that cannot be used, each with the reason.
        run_without: Whether the folder holds a run that has no checkpoint.
    """

    path: Path | None = None
    in_folder: bool = False
    damaged: tuple[tuple[Path, str], ...] = ()
    run_without: bool = False


def find_checkpoint(options: RunOptions) -> FoundCheckpoint:
    """Find the checkpoint that a command means. Nothing is changed, so every rank may ask.

    Args:
        options: Of the command: `folder`, `ckpt_path` and `fresh` count.

    Raises:
        UserError: If the folder holds checkpoints and none is good, there is none though "last" asks for one, or the
            options contradict each other.
    """
    folder, ckpt_path, fresh = options.folder, options.ckpt_path, options.fresh
    if ckpt_path not in (None, "last"):
        path = Path(str(ckpt_path)).expanduser()
        return FoundCheckpoint(path) if options.command == "validate" else _named(folder, path, fresh)
    if fresh and ckpt_path is not None:
        raise UserError(f"{folder.path}: --fresh begins anew and --ckpt_path last goes on. Leave one of them out.")
    return FoundCheckpoint() if fresh else _newest(folder, required=ckpt_path is not None)


def _newest(folder: RunFolder, required: bool) -> FoundCheckpoint:
    """Find the newest good checkpoint of a folder."""
    path, damaged = newest_good(folder.checkpoints)
    if path is not None:
        return FoundCheckpoint(path, in_folder=True, damaged=damaged)
    if damaged:
        raise UserError(
            f"{folder.path}: no checkpoint of this run can be used: "
            + "; ".join(f"{path.name} ({what})" for path, what in damaged)
            + ". Put a good copy of one there, or start anew with --fresh."
        )
    if required:
        raise UserError(f"{folder.last_checkpoint}: no such checkpoint. Leave --ckpt_path out to start a run there.")
    return FoundCheckpoint(run_without=folder.config.exists())


def _named(folder: RunFolder, path: Path, fresh: bool) -> FoundCheckpoint:
    """Take a file that the command names, of this run or of another."""
    inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder.path))
    if inside and fresh:
        raise UserError(f"{folder.path}: --fresh moves the folder aside, and {path} with it. Leave one of them out.")
    if inside and Path(os.path.realpath(path)).parent == Path(os.path.realpath(folder.checkpoints)):
        path = folder.checkpoints / os.path.basename(os.path.realpath(path))  # last.ckpt is a link to another
    if not inside and not fresh and all_newest_first(folder.checkpoints):
        raise UserError(
            f"{folder.path}: the folder holds a run of its own, which {path} is not part of. Move that run aside with "
            "--fresh, or choose another folder with --run_dir."
        )
    return FoundCheckpoint(path, in_folder=inside)
