"""What a command is compared with before a run goes on: its checkpoint, its configuration, its processes."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.cli import LightningArgumentParser

from ssmpretrain.callbacks.ema import EMA
from ssmpretrain.training.checkpoint_folder import read_state
from ssmpretrain.training.config_changes import together, without_unknown
from ssmpretrain.training.global_batch import GlobalBatch

# What those who start processes on several nodes leave in the environment of each.
_LAUNCHERS = ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "OMPI_COMM_WORLD_SIZE", "LSB_JOBID", "NODE_RANK")


def check_launcher(trainer: Trainer) -> None:
    """Refuse to wait for nodes that nobody starts, and other numbers of processes than the recipe's."""
    if trainer.num_nodes > 1 and not any(name in os.environ for name in _LAUNCHERS):
        raise ValueError(
            f"trainer: this recipe is for {trainer.num_nodes} nodes, and no launcher (srun, torchrun, mpirun) started "
            "this process. On one machine add --trainer.num_nodes 1."
        )
    started = int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else trainer.world_size
    if int(os.environ.get("SLURM_PROCID", "0")) and trainer.world_size == 1:
        started = int(os.environ.get("SLURM_NTASKS", "2"))
    if started != trainer.world_size:  # or each would train alone, all in one folder
        nodes = int(os.environ.get("GROUP_WORLD_SIZE", os.environ.get("SLURM_NNODES", "1")))
        raise ValueError(
            f"trainer: the launcher started {started} processes, and the recipe is for {trainer.world_size} "
            f"({trainer.num_devices} devices on {trainer.num_nodes} nodes). "
            f"Add --trainer.devices {started // nodes} --trainer.num_nodes {nodes}."
        )


def check_checkpoint(path: str, model: LightningModule) -> dict[str, Any]:
    """The content of a checkpoint that `model` can continue from."""
    checkpoint = read_state(path)
    needed = {"loops"} if Path(path).is_dir() else {"loops", "state_dict"}
    if not isinstance(checkpoint, dict) or not needed <= checkpoint.keys():
        raise ValueError(
            f"{path}: holds weights but no training state, so it cannot be continued. "
            "Give a checkpoints/last.ckpt of a run of this project."
        )
    objective = checkpoint.get("objective", type(model).__name__)
    if objective != type(model).__name__:
        raise ValueError(
            f"{path}: the checkpoint is of objective {objective}, the recipe asks for {type(model).__name__}. "
            "Give the recipe that it was trained with, or another checkpoint."
        )
    theirs, ours = checkpoint.get("encoder", {}), getattr(model, "encoder_name", None)
    if ours is not None and theirs.get("name") != ours:
        raise ValueError(
            f"{path}: the checkpoint is of encoder {theirs.get('name')!r}, the recipe asks for {ours!r}. "
            f"Set model.init_args.encoder to {theirs.get('name')!r}, or give another checkpoint."
        )
    classes = checkpoint.get("hyper_parameters", {}).get("num_classes")
    if classes != (asked := getattr(model, "num_classes", None)):
        raise ValueError(
            f"{path}: the checkpoint is of {classes} classes, the recipe asks for {asked}. Set model.num_classes to "
            f"{classes}; or start a new run from these weights, with model.init_from instead of ckpt_path."
        )
    return checkpoint


def check_average(path: str, checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Refuse to train the average on with the optimizer of the weights: without the callback that keeps them apart."""
    keeps = [one for one in trainer.callbacks if isinstance(one, EMA | WeightAveraging)]  # type: ignore[attr-defined]
    if "current_model_state" in checkpoint and not keeps:
        raise ValueError(
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
    if "global_batch" in checkpoint:
        return GlobalBatch(**checkpoint["global_batch"])
    trainer, data = config.get("trainer") or {}, (config.get("data") or {}).get("init_args") or {}
    factors = [data.get("batch_size"), *(trainer.get(name) for name in ("devices", "num_nodes"))]
    factors.append(trainer.get("accumulate_grad_batches"))
    return GlobalBatch(*factors) if all(isinstance(factor, int) and factor > 0 for factor in factors) else None


def same_again(then: GlobalBatch, now: GlobalBatch) -> str:
    """How to get the earlier global batch on the devices of now."""
    at_once = now.size // now.accumulation
    if then.size % at_once == 0:
        return f"Set trainer.accumulate_grad_batches to {then.size // at_once}."
    return f"Choose data.batch_size and trainer.accumulate_grad_batches so that it is {then.size} again."
