"""Choice of the checkpoint for a command: the newest good one in the run folder, a named file, or none."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.run_folder import RunFolder
from ssmpretrain.run.options.run_options import RunOptions
from ssmpretrain.training.checkpoints.folder import Inspected, all_newest_first, newest_good


@dataclass(frozen=True)
class FoundCheckpoint:
    """The checkpoint that a command uses, if there is one.

    Attributes:
        path: The checkpoint; None if training or validation begins without one.
        in_folder: Whether the checkpoint lies in the run's own folder, so that the run continues there.
        is_inspected: Whether the checkpoint was compared with its checksum.
        damaged: Newer checkpoints that cannot be used, each with its damage.
        run_without: Whether the folder holds a run that has no checkpoint.
    """

    path: Path | None = None
    in_folder: bool = False
    is_inspected: bool = False
    damaged: tuple[Inspected, ...] = ()
    run_without: bool = False


def find_checkpoint(options: RunOptions) -> FoundCheckpoint:
    """Find the checkpoint that a command uses. The function changes no file, so every rank may call it.

    Args:
        options: Options of the run. The result depends on `command`, `folder`, `ckpt_path` and `fresh`.

    Raises:
        UserError: If the folder holds checkpoints but all are damaged, if `ckpt_path` is "last" and there is no
            checkpoint, or if the options contradict each other.
    """
    folder, ckpt_path, fresh = options.folder, options.ckpt_path, options.fresh
    if ckpt_path not in (None, "last"):
        path = Path(str(ckpt_path)).expanduser()
        return FoundCheckpoint(path) if options.command == "validate" else _named(folder, path, fresh)
    if fresh and ckpt_path is not None:
        raise UserError(f"{folder.path}: --fresh begins anew and --ckpt_path last goes on. Leave one of them out.")
    if fresh:
        return FoundCheckpoint()
    newest, damaged = newest_good(folder.checkpoints)
    if newest is not None:
        return FoundCheckpoint(newest, in_folder=True, is_inspected=True, damaged=damaged)
    if damaged:
        raise UserError(
            f"{folder.path}: no checkpoint of this run can be used: "
            + "; ".join(f"{one.path.name} ({one.damage})" for one in damaged)
            + ". Put a good copy of one there, or start anew with --fresh."
        )
    if ckpt_path is not None:
        raise UserError(f"{folder.last_checkpoint}: no such checkpoint. Leave --ckpt_path out to start a run there.")
    return FoundCheckpoint(run_without=folder.config.exists())


def _named(folder: RunFolder, path: Path, fresh: bool) -> FoundCheckpoint:
    """Check a file that the command names; it may belong to this run or to another one."""
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
