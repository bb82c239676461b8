"""Checks of a checkpoint before a run continues from it: it fits the model and holds a whole training state."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.lightning_private import has_loop_counts, was_restoring
from ssmpretrain.run.messages import explain
from ssmpretrain.run.start.run_request import RunRequest
from ssmpretrain.training.checkpoints.folder import read_state
from ssmpretrain.training.optim.optimizer_state import lost_all
from ssmpretrain.training.stopping.non_finite import NonFiniteGuard


def check_checkpoint(path: str, request: RunRequest, *, to_train: bool, is_inspected: bool = False) -> dict[str, Any]:
    """Read a checkpoint and check that the run can continue from it.

    Args:
        path: The checkpoint.
        request: The run that is about to be trained or validated.
        to_train: Whether the run trains, so that the checkpoint needs more than weights.
        is_inspected: Whether the file was compared with its checksum already.

    Returns:
        Content of the checkpoint. The sharded tensors of a checkpoint in parts are not read.

    Raises:
        UserError: If the checkpoint belongs to another model, or an entry is missing.
    """
    checkpoint = _state(path, is_inspected)
    objective = checkpoint.get("objective", request.objective)
    if objective != request.objective:
        raise UserError(
            f"{path}: the checkpoint is of objective {objective}, the recipe asks for {request.objective}. "
            "Give the recipe that it was trained with, or another checkpoint."
        )
    theirs, ours = checkpoint.get("encoder", {}), request.encoder
    if ours is not None and theirs.get("name") != ours:
        raise UserError(
            f"{path}: the checkpoint is of encoder {theirs.get('name')!r}, the recipe asks for {ours!r}. "
            f"Set model.init_args.encoder to {theirs.get('name')!r}, or give another checkpoint."
        )
    classes = checkpoint.get("hyper_parameters", {}).get("num_classes")
    if classes != request.num_classes:
        raise UserError(
            f"{path}: the checkpoint is of {classes} classes, the recipe asks for {request.num_classes}. Set "
            f"model.num_classes to {classes}; or start a new run from these weights, with model.init_from instead of "
            "ckpt_path."
        )
    _check_training_state(path, checkpoint, request.has_settings, to_train)
    if to_train and request.is_ours:
        _check_progress(path, checkpoint)
    if to_train:
        _check_average(path, checkpoint, request)
    return checkpoint


def _state(path: str, is_inspected: bool) -> dict[str, Any]:
    """Return the content of a checkpoint, after a check that each entry has the type that a run writes."""
    checkpoint = read_state(path, is_inspected=is_inspected)
    if not isinstance(checkpoint, dict):
        raise _lacking(path, ["anything by name"])
    _check_there(path, checkpoint, {"loops"} | (set() if Path(path).is_dir() else {"state_dict"}))
    if wrong := [name for name, kind in _KINDS.items() if not isinstance(checkpoint.get(name, kind()), kind)]:
        raise UserError(f"{path}: {wrong[0]} is of another kind than `fit` writes. Give an earlier checkpoint.")
    return checkpoint


def _check_training_state(path: str, checkpoint: dict[str, Any], has_settings: bool, to_train: bool) -> None:
    """Raise if an entry that Lightning reads is missing or wrong."""
    needed = {"global_step", "epoch", _VERSION} | ({"optimizer_states", "lr_schedulers"} if to_train else set())
    _check_there(path, checkpoint, needed | ({"hyper_parameters"} if has_settings else set()))
    if not has_loop_counts(checkpoint):
        raise UserError(f"{path}: loops does not say how far training was. Give an earlier checkpoint.")
    if not re.match(r"\d+\.\d+", checkpoint[_VERSION]):
        raise UserError(f"{path}: {_VERSION} is no version; got {checkpoint[_VERSION]!r:.40}. Give an earlier one.")
    if to_train and not all(_is_optimizer(state) for state in checkpoint["optimizer_states"] or [None]):
        raise UserError(
            f"{path}: optimizer_states holds no state of an optimizer, as of a file of weights alone. Give an earlier "
            "checkpoint, or start from its weights with model.init_from."
        )


def _check_progress(path: str, checkpoint: dict[str, Any]) -> None:
    """Raise if the states of optimizers and schedulers do not belong to the checkpoint's step.

    An `Objective` saves one scheduler per optimizer. Both step together.
    """
    step, optimizers, schedulers = (checkpoint[name] for name in ("global_step", "optimizer_states", "lr_schedulers"))
    places = [one.get("last_epoch") if isinstance(one, dict) else None for one in schedulers]
    due = (step, step - 1)  # an interrupt may come after the step of the optimizer and before that of the scheduler
    if len(places) != len(optimizers) or any(type(place) is not int or place not in due for place in places):
        raise UserError(
            f"{path}: lr_schedulers says for each of {len(optimizers)} optimizers that its last_epoch is {step:,}, the "
            f"step; got {places!r:.80}. The learning rate would be another. Give an earlier checkpoint, or start from "
            "its weights with model.init_from."
        )
    if step > _skipped(checkpoint) and any(lost_all(state) for state in optimizers):
        raise UserError(
            f"{path}: optimizer_states has no moments, at step {step:,}; the optimizer would begin anew. Give an "
            "earlier checkpoint, or start from its weights with model.init_from."
        )


def _skipped(checkpoint: dict[str, Any]) -> int:
    """Return the number of steps that were skipped because their gradient was not finite."""
    guard = checkpoint.get("callbacks", {}).get(NonFiniteGuard.__qualname__)
    skipped = guard.get("skipped") if isinstance(guard, dict) else 0
    return skipped if isinstance(skipped, int) else 0


def _check_there(path: str, checkpoint: dict[str, Any], needed: set[str]) -> None:
    if missing := sorted(needed - checkpoint.keys()):
        raise _lacking(path, missing)


def _lacking(path: str, what: list[str]) -> UserError:
    return UserError(
        f"{path}: holds no training state that can be continued: it lacks {', '.join(what)}. "
        "Give a checkpoints/last.ckpt of a run of this project; or start from its weights with model.init_from."
    )


_VERSION = "pytorch-lightning_version"
# Types of the entries of a checkpoint, those of this package and those of Lightning.
_KINDS: dict[str, type] = {
    "loops": dict, "state_dict": dict, "hyper_parameters": dict, "encoder": dict, "callbacks": dict, "epoch": int,
    "global_step": int, "optimizer_states": list, "lr_schedulers": list, _VERSION: str, "objective": str,
    "global_batch": dict, "observers": list,
}  # fmt: skip


def _is_optimizer(state: Any) -> bool:
    kinds = {"state": dict, "param_groups": list}
    return isinstance(state, dict) and all(isinstance(state.get(name), kind) for name, kind in kinds.items())


@contextmanager
def restoring_from(path: Any) -> Iterator[None]:
    """Turn errors of Lightning while it restores the state in the checkpoint at `path` into errors with a remedy.

    Raises:
        UserError: Instead of the error that Lightning raised while it restored optimizer, data or callbacks.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
        if not was_restoring(error):
            raise
        if isinstance(error, ValueError | RuntimeError) and explain(error) is not None:
            raise
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{path}: holds a training state that this run cannot be restored from ({said:.200}). Give an earlier "
            "checkpoint, or start from its weights with model.init_from."
        ) from error


def _check_average(path: str, checkpoint: dict[str, Any], request: RunRequest) -> None:
    """Raise if the checkpoint holds EMA weights but no callback of the run keeps them apart from the raw weights.

    The optimizer state belongs to the raw weights.
    """
    if "current_model_state" in checkpoint and not request.keeps_average:
        raise UserError(
            f"{path}: the run keeps an average of its weights, the recipe has no callback for that. "
            "Add ssmpretrain.callbacks.EMA, or start a new run from these weights, with model.init_from."
        )
