"""What a command is compared with before a run goes on: its checkpoint, its configuration, its processes."""

from __future__ import annotations

import argparse
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.cli import LightningArgumentParser

from ssmpretrain.base.errors import UserError
from ssmpretrain.callbacks.ema import EMA
from ssmpretrain.objectives.objective import Objective
from ssmpretrain.run.config_diff import together, without_unknown
from ssmpretrain.run.messages import explain
from ssmpretrain.training.checkpoints.folder import read_state
from ssmpretrain.training.optim.global_batch import GlobalBatch
from ssmpretrain.training.optim.optimizer_state import lost_all
from ssmpretrain.training.stopping.non_finite import NonFiniteGuard

# What those who start processes on several nodes leave in the environment of each.
_LAUNCHERS = ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "OMPI_COMM_WORLD_SIZE", "LSB_JOBID", "NODE_RANK")


def check_launcher(trainer: Trainer) -> None:
    """Refuse to wait for nodes that nobody starts, and other numbers of processes than the recipe's."""
    if trainer.num_nodes > 1 and not any(name in os.environ for name in _LAUNCHERS):
        raise UserError(
            f"trainer: this recipe is for {trainer.num_nodes} nodes, and no launcher (srun, torchrun, mpirun) started "
            "this process. On one machine add --trainer.num_nodes 1."
        )
    started = int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else trainer.world_size
    if int(os.environ.get("SLURM_PROCID", "0")) and trainer.world_size == 1:
        started = int(os.environ.get("SLURM_NTASKS", "2"))
    if started != trainer.world_size:  # or each would train alone, all in one folder
        nodes = int(os.environ.get("GROUP_WORLD_SIZE", os.environ.get("SLURM_NNODES", "1")))
        raise UserError(
            f"trainer: the launcher started {started} processes, and the recipe is for {trainer.world_size} "
            f"({trainer.num_devices} devices on {trainer.num_nodes} nodes). "
            f"Add --trainer.devices {started // nodes} --trainer.num_nodes {nodes}."
        )


def check_checkpoint(path: str, model: LightningModule, *, to_train: bool) -> dict[str, Any]:
    """The content of a checkpoint that `model` can continue from.

    Args:
        path: The checkpoint.
        model: What is continued.
        to_train: Whether it is trained on, which takes more than its weights.

    Raises:
        ValueError: If it is of another model, or lacks something.
    """
    checkpoint = _state(path)
    objective = checkpoint.get("objective", type(model).__name__)
    if objective != type(model).__name__:
        raise UserError(
            f"{path}: the checkpoint is of objective {objective}, the recipe asks for {type(model).__name__}. "
            "Give the recipe that it was trained with, or another checkpoint."
        )
    theirs, ours = checkpoint.get("encoder", {}), getattr(model, "encoder_name", None)
    if ours is not None and theirs.get("name") != ours:
        raise UserError(
            f"{path}: the checkpoint is of encoder {theirs.get('name')!r}, the recipe asks for {ours!r}. "
            f"Set model.init_args.encoder to {theirs.get('name')!r}, or give another checkpoint."
        )
    classes = checkpoint.get("hyper_parameters", {}).get("num_classes")
    if classes != (asked := getattr(model, "num_classes", None)):
        raise UserError(
            f"{path}: the checkpoint is of {classes} classes, the recipe asks for {asked}. Set model.num_classes to "
            f"{classes}; or start a new run from these weights, with model.init_from instead of ckpt_path."
        )
    _check_training_state(path, checkpoint, bool(model.hparams), to_train)
    if to_train and isinstance(model, Objective):
        _check_progress(path, checkpoint)
    return checkpoint


def _state(path: str) -> dict[str, Any]:
    """The content of a checkpoint of a run, each entry of its kind."""
    checkpoint = read_state(path)
    if not isinstance(checkpoint, dict):
        raise _lacking(path, ["anything by name"])
    _check_there(path, checkpoint, {"loops"} | (set() if Path(path).is_dir() else {"state_dict"}))
    if wrong := [name for name, kind in _KINDS.items() if not isinstance(checkpoint.get(name, kind()), kind)]:
        raise UserError(f"{path}: {wrong[0]} is of another kind than `fit` writes. Give an earlier checkpoint.")
    return checkpoint


def _check_training_state(path: str, checkpoint: dict[str, Any], has_settings: bool, to_train: bool) -> None:
    """Refuse a checkpoint without everything that Lightning reads in it."""
    needed = {"global_step", "epoch", _VERSION} | ({"optimizer_states", "lr_schedulers"} if to_train else set())
    _check_there(path, checkpoint, needed | ({"hyper_parameters"} if has_settings else set()))
    if not _is_progress(checkpoint["loops"]):
        raise UserError(f"{path}: loops does not say how far training was. Give an earlier checkpoint.")
    if not re.match(r"\d+\.\d+", checkpoint[_VERSION]):
        raise UserError(f"{path}: {_VERSION} is no version; got {checkpoint[_VERSION]!r:.40}. Give an earlier one.")
    if to_train and not all(_is_optimizer(state) for state in checkpoint["optimizer_states"] or [None]):
        raise UserError(
            f"{path}: optimizer_states holds no state of an optimizer, as of a file of weights alone. Give an earlier "
            "checkpoint, or start from its weights with model.init_from."
        )


def _check_progress(path: str, checkpoint: dict[str, Any]) -> None:
    """Refuse states of optimizers and schedulers that are not those of the checkpoint's step.

    As our objectives save them: one scheduler for each optimizer, stepped with it.
    """
    step, optimizers, schedulers = (checkpoint[name] for name in ("global_step", "optimizer_states", "lr_schedulers"))
    places = [one.get("last_epoch") if isinstance(one, dict) else None for one in schedulers]
    due = (step, step - 1)  # an interrupt may come between the two
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
    """Steps that left the optimizer alone, as their gradient was not finite."""
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
# Entries of a checkpoint and their kinds; ours and Lightning's.
_KINDS: dict[str, type] = {
    "loops": dict, "state_dict": dict, "hyper_parameters": dict, "encoder": dict, "callbacks": dict, "epoch": int,
    "global_step": int, "optimizer_states": list, "lr_schedulers": list, _VERSION: str, "objective": str,
    "global_batch": dict,
}  # fmt: skip


def _is_progress(loops: Any) -> bool:
    """Whether the state of Lightning's loops has the entries that are read of it, with counts in them."""
    try:
        counts = loops["fit_loop"]["epoch_progress"]["current"]
        batches = loops["fit_loop"]["epoch_loop.batch_progress"]["current"]
    except (KeyError, TypeError):
        return False
    named = [part.get(name) for part in (counts, batches) for name in ("ready", "completed", "started", "processed")]
    return all(type(count) is int and count >= 0 for count in named)


def _is_optimizer(state: Any) -> bool:
    kinds = {"state": dict, "param_groups": list}
    return isinstance(state, dict) and all(isinstance(state.get(name), kind) for name, kind in kinds.items())


@contextmanager
def restoring_from(path: Any) -> Iterator[None]:
    """Put an error into words that comes from what the checkpoint at `path` says of optimizer, data or callbacks."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        places = [frame.name for frame in frames if frame.filename.endswith("checkpoint_connector.py")]
        restoring = any("restore" in place for place in places)
        if not restoring or (isinstance(error, ValueError | RuntimeError) and explain(error) is not None):
            raise
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{path}: holds a training state that this run cannot be restored from ({said:.200}). Give an earlier "
            "checkpoint, or start from its weights with model.init_from."
        ) from error


def check_average(path: str, checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Refuse to train the average on with the optimizer of the weights: without the callback that keeps them apart."""
    keeps = [one for one in trainer.callbacks if isinstance(one, EMA | WeightAveraging)]  # type: ignore[attr-defined]
    if "current_model_state" in checkpoint and not keeps:
        raise UserError(
            f"{path}: the run keeps an average of its weights, the recipe has no callback for that. "
            "Add ssmpretrain.callbacks.EMA, or start a new run from these weights, with model.init_from."
        )


def is_complete(checkpoint: dict[str, Any], trainer: Trainer) -> bool:
    """Whether the limits of the trainer leave nothing to do."""
    steps, epochs = trainer.max_steps, trainer.max_epochs
    return (steps != -1 and checkpoint["global_step"] >= steps) or (
        epochs is not None and epochs != -1 and finished_epochs(checkpoint) >= epochs
    )


def finished_epochs(checkpoint: dict[str, Any]) -> int:
    """Epochs that were finished."""
    return int(checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])


def as_yaml(parser: LightningArgumentParser, config: Any) -> str:
    """The configuration as YAML, all defaults written out; but for what was meant for one start."""
    config = config.clone()
    config.ckpt_path, config.fresh, config.allow_changes = None, False, False
    text: str = parser.dump(config, skip_none=False)
    return text


def with_defaults(parser: LightningArgumentParser, old: dict[str, Any], now: str) -> dict[str, Any]:
    """A run's configuration, in which an option that it lacks, of a later version, has its default.

    The defaults are those of the classes that this command's own configuration names: what a run's says is compared,
    and never imported.
    """
    try:
        known = parser.parse_object(without_unknown(yaml.safe_load(now), old))
        filled = yaml.safe_load(parser.dump(known, skip_none=False))
    except (argparse.ArgumentError, ValueError, TypeError, KeyError):  # an option that has no default
        return old
    return dict(together(old, filled))


def batch_of(checkpoint: dict[str, Any], config: dict[str, Any]) -> GlobalBatch | None:
    """The global batch that a run trained with; None where neither its checkpoint nor its configuration says."""
    if said := checkpoint.get("global_batch"):
        names = [one.name for one in fields(GlobalBatch)]
        return _batch(*(said.get(name) for name in names))
    trainer, data = config.get("trainer") or {}, (config.get("data") or {}).get("init_args") or {}
    factors = [data.get("batch_size"), *(trainer.get(name) for name in ("devices", "num_nodes"))]
    factors.append(trainer.get("accumulate_grad_batches"))
    return _batch(*factors)


def _batch(*factors: Any) -> GlobalBatch | None:
    return GlobalBatch(*factors) if all(isinstance(factor, int) and factor > 0 for factor in factors) else None


def same_again(then: GlobalBatch, now: GlobalBatch) -> str:
    """How to get the earlier global batch on the devices of now."""
    at_once = now.size // now.accumulation
    if then.size % at_once == 0:
        return f"Set trainer.accumulate_grad_batches to {then.size // at_once}."
    return f"Choose data.batch_size and trainer.accumulate_grad_batches so that it is {then.size} again."
