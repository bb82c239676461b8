"""Parts of the trainer that a recipe does not name: the callbacks, the logger and the launcher of every run."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar

from ssmpretrain.callbacks.bad_data import BadData
from ssmpretrain.callbacks.loss_plot import LossPlot
from ssmpretrain.callbacks.progress import Throughput, progress_bar
from ssmpretrain.run.metrics_logger import LogEveryEpoch, MetricsLogger
from ssmpretrain.run.options.run_options import RunOptions
from ssmpretrain.run.options.trainer_options import check_callbacks
from ssmpretrain.training.checkpoints.exact_resume import ExactResume
from ssmpretrain.training.checkpoints.saving import Checkpoints
from ssmpretrain.training.optim.parameter_table import ParameterGroups
from ssmpretrain.training.optim.precision import check_precision
from ssmpretrain.training.ranks import fsdp  # noqa: F401  makes `trainer.strategy: fsdp2` known
from ssmpretrain.training.ranks.launcher import set_up_ranks
from ssmpretrain.training.stopping.non_finite import NonFiniteGuard
from ssmpretrain.training.stopping.preemption import Preemption


def trainer_arguments(settings: Any, options: RunOptions) -> dict[str, Any]:
    """Return the arguments of Lightning's Trainer that replace those of the recipe.

    Args:
        settings: Options of the trainer from the recipe, by name. Loggers and callbacks are built objects.
        options: Options of the run.

    Raises:
        UserError: If a callback of the recipe cannot be used.
    """
    chosen = _chosen_callbacks(settings)
    check_callbacks(chosen)
    for callback in chosen:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
            callback.dirpath = str(options.folder.best)  # apart from the checkpoints to continue from
    loggers = settings["logger"] if isinstance(settings["logger"], list) else [settings["logger"]]
    ours = [MetricsLogger(options.folder)] if options.command == "fit" else []
    return {
        "default_root_dir": str(options.folder.path),
        "max_time": None,  # `Preemption` enforces it
        "check_val_every_n_epoch": _validation_interval(settings),
        "logger": [*ours, *(logger for logger in loggers if not isinstance(logger, bool | None))],
        "callbacks": [*chosen, *_our_callbacks(settings, options, chosen)],
    }


def prepare_trainer(trainer: Trainer, options: RunOptions) -> None:
    """Check the precision of a trainer, and let `Launcher` start its ranks.

    Raises:
        UserError: If the precision does not suit this machine.
    """
    check_precision(trainer)
    set_up_ranks(trainer, options.rank_timeout)


def _chosen_callbacks(settings: Any) -> list[Callback]:
    """Return the callbacks that a recipe names."""
    chosen = settings["callbacks"] or []
    return list(chosen) if isinstance(chosen, list) else [chosen]


def _our_callbacks(settings: Any, options: RunOptions, chosen: list[Callback]) -> list[Callback]:
    """Return the callbacks of every run. `run.fit` adds those that need to know where the run starts."""
    ours: list[Callback] = [
        ExactResume(),
        NonFiniteGuard(),
        LogEveryEpoch(),
        ParameterGroups(),
        Throughput(settings["log_every_n_steps"] or 10),
        BadData(),
        LossPlot(),
        Preemption(settings["max_time"]),
    ]
    if settings["enable_progress_bar"] is not False and not any(isinstance(one, ProgressBar) for one in chosen):
        ours.append(progress_bar())
    if settings["enable_checkpointing"] is not False:
        ours.append(Checkpoints(**(options.checkpoints or {})))
    return ours


def _validation_interval(settings: Any) -> int | None:
    """Return the epochs between two validations, at most the length of the run, so that it ends with one."""
    epochs: int | None = settings["max_epochs"]
    interval: int | None = settings["check_val_every_n_epoch"]
    return epochs if 0 < (epochs or 0) < (interval or 0) else interval
