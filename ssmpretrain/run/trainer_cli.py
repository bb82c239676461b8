"""`fit` and `validate`: from a recipe to objects to a trainer, in one run folder."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from jsonargparse.typing import restricted_number_type
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from ssmpretrain.base.json_lines import read_rows, series
from ssmpretrain.base.run_config import read_config
from ssmpretrain.base.run_folder import RunFolder
from ssmpretrain.base.whole_files import move_aside_unless_regular, replace_text, replacing
from ssmpretrain.callbacks.bad_data import BadData
from ssmpretrain.callbacks.ema import EMA
from ssmpretrain.callbacks.loss_plot import LossPlot
from ssmpretrain.callbacks.progress import Throughput, progress_bar
from ssmpretrain.encoders.family import OTHER_WEIGHTS
from ssmpretrain.run.config_diff import changes
from ssmpretrain.run.lock import RunLock
from ssmpretrain.run.metrics_logger import LogEveryEpoch, MetricsLogger
from ssmpretrain.run.recipe_parser import RecipeParser
from ssmpretrain.run.run_checks import (
    as_yaml,
    batch_of,
    check_average,
    check_checkpoint,
    check_launcher,
    finished_epochs,
    is_complete,
    restoring_from,
    same_again,
    with_defaults,
)
from ssmpretrain.run.start import Beginning, find_beginning, settle, take_over, unused
from ssmpretrain.run.trainer_options import check_callbacks, check_numbers, check_options
from ssmpretrain.training.checkpoints.exact_resume import ExactResume
from ssmpretrain.training.checkpoints.saving import Checkpoints
from ssmpretrain.training.optim.global_batch import GlobalBatch
from ssmpretrain.training.optim.parameter_table import ParameterGroups
from ssmpretrain.training.optim.precision import check_precision
from ssmpretrain.training.ranks import fsdp  # noqa: F401  makes `trainer.strategy: fsdp2` known
from ssmpretrain.training.ranks.agreement import RankAgreement
from ssmpretrain.training.ranks.launcher import set_up_ranks
from ssmpretrain.training.ranks.lost import LostRanks
from ssmpretrain.training.stopping.non_finite import NonFiniteGuard
from ssmpretrain.training.stopping.preemption import Preemption

_log = logging.getLogger(__name__)
# What tells a command that it was started before: by SLURM's requeue, by torchrun.
_RESTARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
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
    r"It is recommended to use `self.log\('(val|data)/",  # ours are sums over all ranks already
)


class _WhenJoined(Callback):
    """Calls `then` on rank 0 when all ranks have read the run folder, and `loaded` when they have the checkpoint."""

    def __init__(self, then: Callable[[], None], loaded: Callable[[], None]) -> None:
        self.then, self.loaded = then, loaded

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero:
            self.then()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.loaded()


class TrainerCLI(LightningCLI):
    """LightningCLI with a run folder, our callbacks and errors that can be put into words.

    Args:
        words: The command line after the program's name, e.g. `["fit", "--config", "recipes/mae_vim_b.yaml"]`.

    Attributes:
        folder: The run's folder.
        complete: Whether the run in it has reached its end before.
    """

    folder: RunFolder
    complete = False
    _joined: Callable[[], None] = staticmethod(lambda: None)
    _loaded: Callable[[], None] = staticmethod(lambda: None)
    _lock: RunLock | None = None

    def __init__(self, words: list[str]) -> None:
        os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's business, not our user's
        for message in _NOISE:
            warnings.filterwarnings("ignore", message=message)
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        logging.basicConfig(format="%(message)s")
        logging.getLogger("ssmpretrain").setLevel(logging.INFO)
        self._words = words
        try:
            super().__init__(
                LightningModule,
                LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                save_config_callback=None,  # see _take_over
                seed_everything_default=0,
                trainer_defaults={"log_every_n_steps": 10, "enable_model_summary": False},
                args=words,
                parser_class=RecipeParser,
            )
        finally:
            if self._lock is not None:
                self._lock.release()

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        arguments = {"model", "datamodule"}
        return {"fit": arguments | {"train_dataloaders", "val_dataloaders"}, "validate": arguments | {"dataloaders"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str | None, help="Run folder; runs/NAME-OF-THE-RECIPE by default.")
        parser.add_argument(
            "--fresh",
            action="store_true",
            help="Move an earlier run in the folder aside and start anew; of validate: take no checkpoint of it.",
        )
        parser.add_argument(
            "--rank_timeout",
            type=restricted_number_type("Minutes", float, [(">", 0), ("<=", 100_000)]),
            default=10.0,
            help="Minutes that a rank waits for the others before all stop; above what rank 0 does between two steps.",
        )
        parser.add_argument(
            "--allow_changes", action="store_true", help="Go on with another configuration than the run's."
        )
        parser.add_class_arguments(Checkpoints, "checkpoints", instantiate=False)

    def _set_seed(self) -> None:
        seed = self._get(self.config, "seed_everything")
        if not isinstance(seed, bool) and isinstance(seed, int) and not 0 <= seed < 2**32:
            raise ValueError(f"seed_everything: is from 0 to {2**32 - 1}, or false for none; got {seed}. Use 0, say.")
        super()._set_seed()

    def _parse_ckpt_path(self) -> None:
        """Do not mix a checkpoint's hyper-parameters into the recipe, as Lightning would before the file is checked."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        for option in ("model", "data"):
            if not config.get(option):
                raise ValueError(
                    f"{self.subcommand}: {option} is not set. Give a recipe, e.g. --config recipes/quickstart.yaml"
                )
        check_options(config.trainer)
        for option in ("run_dir", "ckpt_path"):
            if config.get(option) == "":
                raise ValueError(f"{option}: a path, or null for the default; got an empty word. Leave it out.")
        if config.ckpt_path in ("best", "hpc", "registry") and not Path(config.ckpt_path).exists():
            raise ValueError(
                f"ckpt_path: a checkpoint file, or last for the newest of the run; got {config.ckpt_path}, a word of "
                "Lightning's. Name a file of the run's folder checkpoints, or give last."
            )
        self.folder = RunFolder(self._path(config))
        if config.fresh and self.subcommand == "fit" and _is_restarted():
            _log.info("restarted by the scheduler: --fresh was for the first start")
            config.fresh = False
        self._settings = as_yaml(self._parser(self.subcommand), config)
        plain = yaml.safe_load(self._settings)
        check_numbers({name: plain[name] for name in ("model", "data", "checkpoints")})
        self._find_lost_source(config)

    def _path(self, config: Any) -> str | Path:
        """The run's folder: the one that the command names, that whose own config.yaml is given, or the recipe's."""
        given = any(word.partition("=")[0] == "--run_dir" for word in self._words)
        paths = [Path(str(path)) for path in config.get("config") or [] if path is not None]
        if paths and paths[-1].name == "config.yaml" and (paths[-1].parent / "checkpoints").is_dir() and not given:
            return paths[-1].parent  # wherever it has been moved since it was written
        return config.run_dir or Path("runs") / (paths[-1].stem if paths else "unnamed")

    def _find_lost_source(self, config: Any) -> None:
        """Where a run goes on and a file that it began with is gone, its checkpoint says what its towers are."""
        model = config.model.get("init_args") or {}
        for option, settings in (("model", model), ("model.text", model.get("text") or {})):
            source = settings.get("init_from")
            if source is None or Path(source).expanduser().exists():
                continue
            checkpoint = self._beginning(config).checkpoint
            if checkpoint is not None:
                _log.info("%s.init_from %s is gone; it comes from %s", option, source, checkpoint)
                settings["init_from"] = str(checkpoint)

    def _beginning(self, config: Any) -> Beginning:
        if self.subcommand == "validate" and config.ckpt_path not in (None, "last"):
            return Beginning(Path(config.ckpt_path).expanduser())  # of whatever run
        return find_beginning(self.folder, config.ckpt_path, bool(config.fresh))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = self.config_init[self.subcommand]["trainer"]
        chosen = settings["callbacks"] or []
        chosen = chosen if isinstance(chosen, list) else [chosen]
        check_callbacks(chosen)
        for callback in chosen:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(self.folder.best)  # apart from those that a run goes on from
        if 0 < (settings["max_epochs"] or 0) < (settings["check_val_every_n_epoch"] or 0):
            settings["check_val_every_n_epoch"] = settings["max_epochs"]  # a short try ends with a validation too
        loggers = settings["logger"] if isinstance(settings["logger"], list) else [settings["logger"]]
        ours = [MetricsLogger(self.folder)] if self.subcommand == "fit" else []
        self._agreement = RankAgreement(yaml.safe_load(self._settings))
        trainer = super().instantiate_trainer(
            default_root_dir=str(self.folder.path),
            max_time=None,  # see Preemption
            logger=[*ours, *(logger for logger in loggers if not isinstance(logger, bool | None))],
            callbacks=[LostRanks(), self._agreement, *chosen, *self._callbacks(settings, chosen)],
            **kwargs,
        )
        check_precision(trainer)
        set_up_ranks(trainer, timedelta(minutes=self.config[self.subcommand].rank_timeout))
        return trainer

    def _callbacks(self, settings: Any, chosen: list[Callback]) -> list[Callback]:
        """What every run gets beside those `chosen` by its recipe."""
        ours: list[Callback] = [
            _WhenJoined(lambda: self._joined(), lambda: self._loaded()),
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
            ours.append(Checkpoints(**self.config[self.subcommand].checkpoints))
        return ours

    def before_fit(self) -> None:
        config = self.config_init["fit"]
        check_launcher(self.trainer)
        self.folder.check_links()
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.folder.prepare()  # a try that leaves the run in the folder alone
            return
        first = self.trainer.is_global_zero
        if first and self.folder.path.is_dir():
            self._lock = RunLock(self.folder.path)
        beginning = self._beginning(config)
        config.ckpt_path, step = None, 0
        if beginning.checkpoint is not None:
            config.ckpt_path = str(beginning.checkpoint)
            step = self._check_run(beginning, bool(config.allow_changes))
        self._agreement.options["step to begin at"] = step  # on a slow file system a rank may see an older checkpoint
        if self.complete:
            return
        if first:
            self._claim(bool(config.fresh), step)
        self._joined = lambda: self._take_over(beginning, step)
        self._loaded = lambda: settle(self.folder, beginning, step)

    def _check_run(self, beginning: Beginning, allow_changes: bool) -> int:
        """Refuse what the run cannot go on with, and say where it goes on; returns the step.

        Every rank does, so that none waits for one that has left.
        """
        path = str(beginning.checkpoint)
        checkpoint = check_checkpoint(path, self.model, to_train=True)
        check_average(path, checkpoint, self.trainer)
        if beginning.continues:
            self._check_changes(checkpoint, allow_changes)
        self._name_damaged(beginning)
        stopped_early = checkpoint.get("stopped_early", False) and not allow_changes
        self.complete = stopped_early or is_complete(checkpoint, self.trainer)
        if self.trainer.is_global_zero:
            _log.info("%s", self._where(beginning, checkpoint))
        return int(checkpoint["global_step"])

    def _name_damaged(self, beginning: Beginning) -> None:
        if self.trainer.is_global_zero:
            for path, what in beginning.damaged:
                _log.warning("%s cannot be used: %s", path, what)

    def _where(self, beginning: Beginning, checkpoint: dict[str, Any]) -> str:
        """One line that says where the run goes on, or that there is nothing left to do."""
        step, epochs = checkpoint["global_step"], finished_epochs(checkpoint)
        if self.complete and checkpoint.get("stopped_early"):
            return (
                f"{self.folder.path} was stopped early, as its recipe asks for, at step {step:,} in epoch {epochs:,}. "
                "Go on all the same with --allow_changes, or start anew with --fresh."
            )
        if self.complete:
            limit = "max_epochs" if step < self.trainer.max_steps or self.trainer.max_steps == -1 else "max_steps"
            return (
                f"{self.folder.path} is complete: {epochs:,} epoch{'s' * (epochs != 1)}, step {step:,}. Set a higher "
                f"trainer.{limit} with --allow_changes, or start anew with --fresh."
            )
        start = f"continuing {self.folder.path} at step {step:,}, epoch {epochs:,}"
        if (samples := self._samples(checkpoint)) is not None:
            start += f", sample {samples:,}"
        return start if beginning.continues and not beginning.damaged else f"{start}, from {beginning.checkpoint}"

    def _samples(self, checkpoint: dict[str, Any]) -> int | None:
        """Samples trained, as the data module counts them; else by steps and batch."""
        counted = checkpoint.get(type(self.datamodule).__qualname__)
        if isinstance(counted, dict) and isinstance(counted.get("samples"), int):
            return int(counted["samples"])
        batch = batch_of(checkpoint, {})
        return checkpoint["global_step"] * batch.size if batch else None

    def _check_changes(self, checkpoint: dict[str, Any], allow: bool) -> None:
        """Show in what this command's configuration differs from the run's, and refuse to go on with that."""
        try:
            stored = read_config(self.folder.config)
        except ValueError as error:
            if not allow:
                raise ValueError(
                    f"{error} So nothing tells whether this is the run's configuration. Put it back, or go on all the "
                    "same with --allow_changes."
                ) from error
            return
        parser = self._parser("fit")
        old, new = with_defaults(parser, stored, self._settings), yaml.safe_load(self._settings)
        then = batch_of(checkpoint, old)
        now = GlobalBatch.of(self.trainer, self.datamodule) if then is not None else None
        lines = changes(old, new, same_batch=then is not None)
        if then is not None and now is not None and then.size != now.size:
            lines.append(f"global batch: {then.product}, now {now.product}. {same_again(then, now)}")
        if not lines:
            return
        shown = f"{self.folder.path}: the configuration is not the one that the run was started with\n  "
        shown += "\n  ".join(lines)
        if not allow:
            raise ValueError(shown + "\nGo on with it all the same: --allow_changes. Start anew: --fresh.")
        if self.trainer.is_global_zero:
            _log.warning("%s", shown)

    def _claim(self, fresh: bool, step: int) -> None:
        """Make the run's folder, or move the one that is there aside, and keep other jobs out of it."""
        if fresh and (moved := self.folder.move_aside()):
            _log.info("earlier run moved to %s", moved)
            if self._lock is not None:
                self._lock.release()
                self._lock = None
        self.folder.prepare(step)
        if self._lock is None:
            self._lock = RunLock(self.folder.path)

    def _take_over(self, beginning: Beginning, step: int) -> None:
        """Bring the folder to where the run begins, and note the configuration."""
        if beginning.lost:
            _log.info("%s: the run there has no checkpoint; it starts anew, its metrics set aside", self.folder.path)
        take_over(self.folder, beginning, step)
        path = self.folder.config
        move_aside_unless_regular(path)
        if path.exists() and (earlier := path.read_bytes()) != self._settings.encode():
            with replacing(unused(path)) as copy:
                copy.write(earlier)
        replace_text(path, self._settings)

    def fit(self, model: LightningModule, **arguments: Any) -> None:
        """Train; of a complete run there is nothing to do."""
        if not self.complete:
            with restoring_from(arguments.get("ckpt_path")):
                self.trainer.fit(model, **{**arguments, "weights_only": True})

    def before_validate(self) -> None:
        config = self.config_init["validate"]
        if getattr(self.datamodule, "val", "") is None:
            raise ValueError("validate: images to evaluate are in data.val; got null. Set data.val.")
        check_launcher(self.trainer)
        self.folder.check_links()
        beginning = self._beginning(config)
        if beginning.checkpoint is None:
            self._say_untrained()
            return
        self._name_damaged(beginning)
        config.ckpt_path = str(beginning.checkpoint)
        checkpoint = check_checkpoint(config.ckpt_path, self.model, to_train=False)
        if self.trainer.is_global_zero:
            step, epochs = checkpoint["global_step"], finished_epochs(checkpoint)
            _log.info("validating the weights of %s, step %s, epoch %d", config.ckpt_path, f"{step:,}", epochs)
            if average := self._average():
                _log.info("reported: %s", average.in_words())
            elif "current_model_state" in checkpoint:
                _log.warning("the run reports the average of its weights; without the EMA callback val/* are of that")

    def _say_untrained(self) -> None:
        """Say that no checkpoint is validated, and which weights are."""
        args = getattr(self.model, "encoder_args", {})
        source = getattr(self.model, "init_from", None) or next(
            (name for name in OTHER_WEIGHTS if args.get(name)), None
        )
        weights = (
            "untrained" if source is None else f"those that training would start with: of {source}, else untrained"
        )
        if self.trainer.is_global_zero:
            _log.warning(
                "%s: no checkpoint of this run is used; the weights are %s. For a checkpoint of another place give "
                "--ckpt_path FILE or --run_dir FOLDER.",
                self.folder.path, weights,
            )  # fmt: skip

    def validate(self, model: LightningModule, **arguments: Any) -> None:
        """Evaluate, from a file that is read as data only."""
        with restoring_from(arguments.get("ckpt_path")):
            self.trainer.validate(model, **{**arguments, "weights_only": True})

    def after_fit(self) -> None:
        if self.trainer.is_global_zero:
            print(_summary(self.folder, self._average()))

    def _average(self) -> EMA | None:
        return next((one for one in self.trainer.callbacks if isinstance(one, EMA)), None)  # type: ignore[attr-defined]


def _is_restarted() -> bool:
    """Whether a scheduler started this very command before."""
    return any(os.environ.get(name, "0") not in ("", "0") for name in _RESTARTS)


def _summary(folder: RunFolder, average: EMA | None) -> str:
    """What a person wants to know when training is over; where there are two sets of weights, which is which."""
    rows = read_rows(folder.metrics)
    lines = ["", f"{'run':<16}{folder.path}"]
    for name, label in (("train/loss", "train loss"), ("val/loss", "val loss"), ("val/loss_ema", "EMA val loss"),
                        ("val/top1", "top-1"), ("val/top1_ema", "EMA top-1"), ("val/top5", "top-5"),
                        ("val/top5_ema", "EMA top-5"), ("val/knn", "kNN"), ("val/linear_probe", "linear probe"),
                        ("val/effective_rank", "effective rank"), ("val/zeroshot_top1", "zero-shot"),
                        ("val/zeroshot_held_out", "unseen classes"), ("val/i2t_r1", "R@1 image-text"),
                        ("val/t2i_r1", "R@1 text-image")):  # fmt: skip
        if values := [value for _, value in series(rows, name)]:
            lines.append(f"{label:<16}{values[0]:.4g}" + (f" -> {values[-1]:.4g}" if len(values) > 1 else ""))
    if average is not None:
        lines.append(f"{'reported':<16}{average.in_words()}")
    for label, path in (("checkpoint", folder.last_checkpoint), ("loss plot", folder.loss_plot),
                        ("pictures", folder.reconstruction), ("similarities", folder.similarity)):  # fmt: skip
        if path.exists():
            lines.append(f"{label:<16}{path}")
    return "\n".join(lines)
