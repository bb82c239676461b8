"""`fit` and `validate`: from a recipe to objects to a trainer, in one run folder."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from ssmpretrain.callbacks.ema import EMA
from ssmpretrain.callbacks.loss_plot import LossPlot
from ssmpretrain.callbacks.progress import Throughput, progress_bar
from ssmpretrain.encoders.checkpoint_file import read_content
from ssmpretrain.training.checkpoints import Checkpoints
from ssmpretrain.training.non_finite import NonFiniteGuard
from ssmpretrain.training.parameter_table import ParameterGroups
from ssmpretrain.training.preemption import Preemption
from ssmpretrain.training.run_folder import LogEveryEpoch, MetricsLogger, RunFolder, read_metrics

_log = logging.getLogger(__name__)
# What those who start processes on several nodes leave in the environment of each.
_LAUNCHERS = ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "OMPI_COMM_WORLD_SIZE", "LSB_JOBID", "NODE_RANK")
# Warnings of Lightning about itself, or about what the run folder takes care of.
_NOISE = (
    r"Found \d+ module\(s\) in eval mode at the start of training",  # a frozen encoder
    "LightningCLI's args parameter is intended",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    "Checkpoint directory .* exists and is not empty",
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    "The '.*_dataloader' does not have many workers",
    "You're using the WeightAveraging callback with a model that overrides",
    "You have overridden `on_before_batch_transfer`",
    r"It is recommended to use `self.log\('val/",  # ours are sums over all ranks already
)


class _SaveConfig(SaveConfigCallback):
    """Write the run's config.yaml, which is that of `fit`."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class _ExactParser(LightningArgumentParser):
    """Takes no abbreviated options: `--model.optimizer.lr 1` would silently set `lr_per_256`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})


class TrainerCLI(LightningCLI):
    """LightningCLI with a run folder, our callbacks and errors that can be put into words.

    Args:
        words: The command line after the program's name, e.g. `["fit", "--config", "recipes/mae_vim_b.yaml"]`.

    Attributes:
        folder: The run's folder.
    """

    folder: RunFolder

    def __init__(self, words: list[str]) -> None:
        os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's business, not our user's
        for message in _NOISE:
            warnings.filterwarnings("ignore", message=message)
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        logging.basicConfig(format="%(message)s")
        logging.getLogger("ssmpretrain").setLevel(logging.INFO)
        strict = {"exit_on_error": False}  # errors come to ssmpretrain.messages instead of a usage dump
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=_SaveConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_kwargs={**strict, **dict.fromkeys(self.subcommands(), strict)},
            trainer_defaults={"log_every_n_steps": 10, "enable_model_summary": False},
            args=words,
            parser_class=_ExactParser,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        arguments = {"model", "datamodule"}
        return {"fit": arguments | {"train_dataloaders", "val_dataloaders"}, "validate": arguments | {"dataloaders"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str | None, help="Run folder; runs/NAME-OF-THE-RECIPE by default.")
        parser.add_argument(
            "--fresh", action="store_true", help="Move an earlier run in the folder aside and start anew."
        )
        parser.add_class_arguments(Checkpoints, "checkpoints", instantiate=False)

    def _parse_ckpt_path(self) -> None:
        """Do not mix a checkpoint's hyper-parameters into the recipe, as Lightning would before the file is checked."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        for option in ("model", "data"):
            if not config.get(option):
                raise ValueError(
                    f"{self.subcommand}: {option} is not set. Give a recipe, e.g. --config recipes/quickstart.yaml"
                )
        self.folder = RunFolder(config.run_dir or Path("runs") / _recipe_name(config.get("config")))
        _without_lost_source(config, self._checkpoint_path(config))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = self.config_init[self.subcommand]["trainer"]
        chosen = settings["callbacks"] or []
        loggers = settings["logger"] if isinstance(settings["logger"], list) else [settings["logger"]]
        ours = [MetricsLogger(self.folder)] if self.subcommand == "fit" else []
        return super().instantiate_trainer(
            default_root_dir=str(self.folder.path),
            max_time=None,  # see Preemption
            logger=[*ours, *(logger for logger in loggers if not isinstance(logger, bool | None))],
            callbacks=[*(chosen if isinstance(chosen, list) else [chosen]), *self._callbacks(settings)],
            **kwargs,
        )

    def _callbacks(self, settings: Any) -> list[Callback]:
        """What every run gets beside the callbacks of its recipe."""
        ours: list[Callback] = [
            NonFiniteGuard(),
            LogEveryEpoch(),
            ParameterGroups(),
            Throughput(settings["log_every_n_steps"] or 10),
            LossPlot(),
            Preemption(settings["max_time"]),
        ]
        if settings["enable_progress_bar"] is not False:
            ours.append(progress_bar())
        if settings["enable_checkpointing"] is not False:
            ours.append(Checkpoints(**self.config[self.subcommand].checkpoints))
        return ours

    def before_fit(self) -> None:
        config = self.config_init["fit"]
        self._find_checkpoint()
        if self.trainer.is_global_zero:
            _claim(self.folder, bool(config.fresh), config.ckpt_path)

    def before_validate(self) -> None:
        self._find_checkpoint()

    def _find_checkpoint(self) -> None:
        """Resolve `--ckpt_path last` and refuse a file that the trainer could not use, before it meets it."""
        config = self.config_init[self.subcommand]
        _check_launcher(self.trainer)
        config.ckpt_path = self._checkpoint_path(config)
        if config.ckpt_path is not None:
            checkpoint = _check_checkpoint(config.ckpt_path, self.model)
            if self.subcommand == "fit":
                _check_average(config.ckpt_path, checkpoint, self.trainer)
            _log.info(
                "%s %s, step %d, epoch %d", "continuing from" if self.subcommand == "fit" else "weights of",
                config.ckpt_path, checkpoint["global_step"], checkpoint["epoch"],
            )  # fmt: skip

    def _checkpoint_path(self, config: Any) -> str | None:
        """What `--ckpt_path` names; "last" is the run's newest."""
        path: str | None = config.ckpt_path
        return str(self.folder.last_checkpoint) if path == "last" else path

    def after_fit(self) -> None:
        if self.trainer.is_global_zero:
            print(_summary(self.folder))


def _without_lost_source(config: Any, checkpoint: str | None) -> None:
    """Where a run goes on and the file it began with is gone, its checkpoint says what encoder it has."""
    settings = config.model.get("init_args") or {}
    source = settings.get("init_from")
    if checkpoint is not None and source is not None and not Path(source).expanduser().exists():
        _log.info("model.init_from %s is gone; the encoder comes from %s", source, checkpoint)
        settings["init_from"] = checkpoint


def _check_launcher(trainer: Trainer) -> None:
    """Refuse to wait for nodes that nobody starts."""
    if trainer.num_nodes > 1 and not any(name in os.environ for name in _LAUNCHERS):
        raise ValueError(
            f"trainer: this recipe is for {trainer.num_nodes} nodes, and no launcher (srun, torchrun, mpirun) started "
            "this process. On one machine add --trainer.num_nodes 1."
        )


def _claim(folder: RunFolder, fresh: bool, ckpt_path: str | None) -> None:
    """Make the run's folder, but never over another run."""
    if fresh and ckpt_path is None:
        if moved := folder.move_aside():
            _log.info("earlier run moved to %s", moved)
    elif ckpt_path is None and folder.last_checkpoint.exists():
        raise ValueError(
            f"{folder.path}: the folder holds an earlier run. Continue it with --ckpt_path last, "
            "move it aside with --fresh, or choose another folder with --run_dir."
        )
    folder.prepare()


def _check_checkpoint(path: str, model: LightningModule) -> dict[str, Any]:
    """The content of a checkpoint that `model` can continue from."""
    checkpoint = read_content(path)
    if not isinstance(checkpoint, dict) or not {"state_dict", "loops"} <= checkpoint.keys():
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


def _check_average(path: str, checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Refuse to train the average on with the optimizer of the weights: without the callback that keeps them apart."""
    keeps = [one for one in trainer.callbacks if isinstance(one, EMA | WeightAveraging)]  # type: ignore[attr-defined]
    if "current_model_state" in checkpoint and not keeps:
        raise ValueError(
            f"{path}: the run keeps an average of its weights, the recipe has no callback for that. "
            "Add ssmpretrain.callbacks.EMA, or start a new run from these weights, with model.init_from."
        )


def _recipe_name(configs: Any) -> str:
    """Name of the last recipe given, for the run folder."""
    paths = [Path(str(path)) for path in configs or [] if path is not None]
    return paths[-1].stem if paths else "unnamed"


def _summary(folder: RunFolder) -> str:
    """What a person wants to know when training is over."""
    rows = read_metrics(folder.metrics) if folder.metrics.exists() else []
    lines = ["", f"{'run':<16}{folder.path}"]
    for name, label in (("train/loss", "train loss"), ("val/loss", "val loss"), ("val/top1", "top-1"),
                        ("val/top5", "top-5"), ("val/knn", "kNN"), ("val/linear_probe", "linear probe"),
                        ("val/effective_rank", "effective rank")):  # fmt: skip
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            lines.append(f"{label:<16}{values[0]:.4g} -> {values[-1]:.4g}")
    for label, path in (("checkpoint", folder.last_checkpoint), ("loss plot", folder.loss_plot),
                        ("pictures", folder.reconstruction)):  # fmt: skip
        if path.exists():
            lines.append(f"{label:<16}{path}")
    return "\n".join(lines)
