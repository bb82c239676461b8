"""The start of a run: its checkpoint, its step, whether training is left to do, and the changed options."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.lightning_private import finished_epochs
from ssmpretrain.base.run_config import read_config
from ssmpretrain.run.options.run_options import RunOptions
from ssmpretrain.run.start.checkpoint_checks import check_checkpoint
from ssmpretrain.run.start.config_diff import changes
from ssmpretrain.run.start.find_checkpoint import FoundCheckpoint, find_checkpoint
from ssmpretrain.run.start.observers import package_and_class
from ssmpretrain.run.start.run_request import RunRequest
from ssmpretrain.training.optim.global_batch import GlobalBatch

_log = logging.getLogger(__name__)
Note = tuple[int, str]  # logging level and text


@dataclass(frozen=True)
class RunStart:
    """The start of a run, decided once by `decide`. All ranks come to the same result.

    Attributes:
        found: The checkpoint that the command uses.
        step: Optimizer steps before the checkpoint; 0 without a checkpoint.
        complete: Whether the run in the folder has reached its end, so that no training is left to do.
        changes: Lines that name the options in which the command differs from the run, one line per option.
        notes: Messages for the user, each with its logging level.
    """

    found: FoundCheckpoint = field(default_factory=FoundCheckpoint)
    step: int = 0
    complete: bool = False
    changes: tuple[str, ...] = ()
    notes: tuple[Note, ...] = ()

    @classmethod
    def decide(cls, options: RunOptions, request: RunRequest) -> RunStart:
        """Decide which checkpoint a run starts from, and compare the run in the folder with the one of this command.

        The method changes no file.

        Args:
            options: Options of the run.
            request: The run that is about to be trained or validated.

        Raises:
            UserError: If no checkpoint of the run can be used, if the checkpoint does not fit the run, or if
                the configuration has changed without `--allow_changes`.
        """
        found = find_checkpoint(options)
        if found.path is None:
            return cls(found, notes=_without_checkpoint(options, request, found))
        path, to_train = str(found.path), options.command == "fit"
        checkpoint = check_checkpoint(path, request, to_train=to_train, is_inspected=found.is_inspected)
        damaged = tuple((logging.WARNING, f"{one.path} cannot be used: {one.damage}") for one in found.damaged)
        step = int(checkpoint["global_step"])
        if not to_train:
            return cls(found, step, notes=(*damaged, *_validating(path, checkpoint, request)))
        changed = _changes(options, request, checkpoint) if found.in_folder else ()
        notes = ((logging.WARNING, _shown(options, changed)), *damaged) if changed else damaged
        stopped_early = checkpoint.get("stopped_early", False) and not options.allow_changes
        complete = bool(stopped_early or is_complete(checkpoint, request))
        told = _complete(options, request, checkpoint) if complete else _continuing(options, request, found, checkpoint)
        return cls(found, step, complete, changed, (*notes, (logging.INFO, told)))

    @property
    def ckpt_path(self) -> Path | None:
        """The checkpoint that the trainer restores; None to begin anew."""
        return self.found.path

    def tell(self) -> None:
        """Log all notes. Call it on one rank."""
        for level, text in self.notes:
            _log.log(level, "%s", text)


def is_complete(checkpoint: dict[str, Any], request: RunRequest) -> bool:
    """Return whether `checkpoint` has reached max_steps or max_epochs."""
    steps, epochs = request.max_steps, request.max_epochs
    if steps != -1 and checkpoint["global_step"] >= steps:
        return True
    return epochs not in (None, -1) and finished_epochs(checkpoint) >= epochs


def _without_checkpoint(options: RunOptions, request: RunRequest, found: FoundCheckpoint) -> tuple[Note, ...]:
    folder = options.folder.path
    if options.command == "validate":
        weights = "untrained"
        if request.begins_with is not None:
            weights = f"those that training would start with: of {request.begins_with}, else untrained"
        text = (
            f"{folder}: no checkpoint of this run is used; the weights are {weights}. For a checkpoint of another "
            "place give --ckpt_path FILE or --run_dir FOLDER."
        )
        return ((logging.WARNING, text),)
    if found.run_without:
        return ((logging.INFO, f"{folder}: the run there has no checkpoint; it starts anew, its metrics set aside"),)
    return ()


def _validating(path: str, checkpoint: dict[str, Any], request: RunRequest) -> tuple[Note, ...]:
    step, epochs = checkpoint["global_step"], finished_epochs(checkpoint)
    notes = [(logging.INFO, f"validating the weights of {path}, step {step:,}, epoch {epochs}")]
    if request.reported is not None:
        notes.append((logging.INFO, f"reported: {request.reported}"))
    elif "current_model_state" in checkpoint:
        text = "the run reports the average of its weights; without the EMA callback val/* are of that"
        notes.append((logging.WARNING, text))
    return tuple(notes)


def _complete(options: RunOptions, request: RunRequest, checkpoint: dict[str, Any]) -> str:
    step, epochs, folder = checkpoint["global_step"], finished_epochs(checkpoint), options.folder.path
    if checkpoint.get("stopped_early"):
        return (
            f"{folder} was stopped early, as its recipe asks for, at step {step:,} in epoch {epochs:,}. "
            "Go on all the same with --allow_changes, or start anew with --fresh."
        )
    limit = "max_epochs" if step < request.max_steps or request.max_steps == -1 else "max_steps"
    return (
        f"{folder} is complete: {epochs:,} epoch{'s' * (epochs != 1)}, step {step:,}. Set a higher trainer.{limit} "
        "with --allow_changes, or start anew with --fresh."
    )


def _continuing(options: RunOptions, request: RunRequest, found: FoundCheckpoint, checkpoint: dict[str, Any]) -> str:
    step, epochs = checkpoint["global_step"], finished_epochs(checkpoint)
    text = f"continuing {options.folder.path} at step {step:,}, epoch {epochs:,}"
    if (samples := _samples(checkpoint, request.data)) is not None:
        text += f", sample {samples:,}"
    return text if found.in_folder and not found.damaged else f"{text}, from {found.path}"


def _samples(checkpoint: dict[str, Any], data: str) -> int | None:
    """Return the number of trained samples: counted by the data module, or else steps times global batch."""
    counted = checkpoint.get(data)
    if isinstance(counted, dict) and isinstance(counted.get("samples"), int):
        return int(counted["samples"])
    batch = GlobalBatch.stored(checkpoint, {})
    return checkpoint["global_step"] * batch.size if batch else None


def _changes(options: RunOptions, request: RunRequest, checkpoint: dict[str, Any]) -> tuple[str, ...]:
    """Compare the configuration of this command with the run's; raise if it has changed without permission."""
    try:
        stored = read_config(options.folder.config)
    except ValueError as error:
        if not options.allow_changes:
            raise UserError(
                f"{error} So nothing tells whether this is the run's configuration. Put it back, or go on all the "
                "same with --allow_changes."
            ) from error
        return ()
    old, now = request.with_defaults(stored), request.batch
    then = GlobalBatch.stored(checkpoint, old)
    noted = (path for path in checkpoint.get("observers", []) if isinstance(path, str))
    known = request.observers | {package_and_class(path) for path in noted}
    lines = changes(old, options.plain_settings, same_batch=then is not None, observers=known)
    if then is not None and now is not None and then.size != now.size:
        lines.append(f"global batch: {then.product}, now {now.product}. {now.how_to_get(then)}")
    if lines and not options.allow_changes:
        raise UserError(f"{_shown(options, lines)}\nGo on with it all the same: --allow_changes. Start anew: --fresh.")
    return tuple(lines)


def _shown(options: RunOptions, lines: Iterable[str]) -> str:
    return "\n  ".join(
        [f"{options.folder.path}: the configuration is not the one that the run was started with", *lines]
    )
