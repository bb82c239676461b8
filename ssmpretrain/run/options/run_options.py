"""Options of a run beside its model, data and trainer: folder, starting point, and the whole configuration."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from jsonargparse.typing import restricted_number_type
from lightning.pytorch.cli import LightningArgumentParser

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.run_folder import RunFolder
from ssmpretrain.run.options.trainer_options import check_numbers, check_options
from ssmpretrain.training.checkpoints.saving import Checkpoints

_log = logging.getLogger(__name__)
# SLURM and torchrun count in these variables how often they have started this command before.
_RESTARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
# Options for a single start, which config.yaml of the run does not keep.
_OF_ONE_START = {"ckpt_path": None, "fresh": False, "allow_changes": False}


def add_run_options(parser: LightningArgumentParser) -> None:
    """Add the options of a run to the parser of `fit` or `validate`."""
    parser.add_argument("--run_dir", type=str | None, help="Run folder; runs/NAME-OF-THE-RECIPE by default.")
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="Move an earlier run in the folder aside and start anew. With validate: use none of its checkpoints.",
    )
    parser.add_argument(
        "--rank_timeout",
        type=restricted_number_type("Minutes", float, [(">", 0), ("<=", 100_000)]),
        default=10.0,
        help="Minutes that a rank waits for the others before all stop. It must exceed the longest work of rank 0 "
        "between two steps.",
    )
    parser.add_argument("--allow_changes", action="store_true", help="Continue with a changed configuration.")
    parser.add_class_arguments(Checkpoints, "checkpoints", instantiate=False)


@dataclass(frozen=True)
class RunOptions:
    """Options of a run beside its model, data and trainer.

    Attributes:
        command: "fit" or "validate".
        folder: Folder of the run.
        ckpt_path: None or "last" for the newest good checkpoint of the folder; otherwise a file.
        fresh: Begin anew, whatever the folder holds.
        allow_changes: Continue although the configuration differs from the one that the run was started with.
        rank_timeout: Time that a rank waits for the others.
        checkpoints: Arguments of `Checkpoints`.
        settings: The whole configuration as YAML, with all defaults, without the options for a single start.
    """

    command: str
    folder: RunFolder
    ckpt_path: str | None = None
    fresh: bool = False
    allow_changes: bool = False
    rank_timeout: timedelta = timedelta(minutes=10)
    checkpoints: dict[str, Any] | None = None
    settings: str = "{}"

    @classmethod
    def of(cls, command: str, config: Any, words: Sequence[str], parser: LightningArgumentParser) -> RunOptions:
        """Check the configuration of a command, and read the options of the run from it.

        Args:
            command: "fit" or "validate".
            config: Parsed configuration of the command, before any class in it is built.
            words: The command line, which may name the folder.
            parser: Parser of the command.

        Raises:
            UserError: If an option is missing or out of range.
        """
        for option in ("model", "data"):
            if not config.get(option):
                raise UserError(f"{command}: {option} is not set. Give a recipe, e.g. --config recipes/quickstart.yaml")
        check_options(config.trainer)
        for option in ("run_dir", "ckpt_path"):
            if config.get(option) == "":
                raise UserError(f"{option}: a path, or null for the default; got an empty word. Leave it out.")
        if config.ckpt_path in ("best", "hpc", "registry") and not Path(config.ckpt_path).exists():
            raise UserError(
                f"ckpt_path: a checkpoint file, or last for the newest of the run; got {config.ckpt_path}, a word of "
                "Lightning's. Name a file of the run's folder checkpoints, or give last."
            )
        fresh = bool(config.fresh)
        if fresh and command == "fit" and _is_restarted():
            _log.info("restarted by the scheduler: --fresh was for the first start")
            fresh = False
        options = cls(
            command, RunFolder(_folder_of(config, words)), config.ckpt_path, fresh, bool(config.allow_changes),
            timedelta(minutes=config.rank_timeout), dict(config.checkpoints), _as_yaml(parser, config),
        )  # fmt: skip
        check_numbers({name: options.plain_settings[name] for name in ("model", "data", "checkpoints")})
        return options

    @property
    def plain_settings(self) -> dict[str, Any]:
        """The whole configuration as nested dictionaries."""
        settings: dict[str, Any] = yaml.safe_load(self.settings)
        return settings


def check_seed(seed: Any) -> None:
    """Raise a UserError if `seed_everything` is a number that NumPy does not take as a seed."""
    if not isinstance(seed, bool) and isinstance(seed, int) and not 0 <= seed < 2**32:
        raise UserError(f"seed_everything: is from 0 to {2**32 - 1}, or false for none; got {seed}. Use 0, say.")


def _folder_of(config: Any, words: Sequence[str]) -> str | Path:
    """Return the folder of the run: named by the command, or the folder of a run's config.yaml, or runs/RECIPE."""
    is_named = any(word.partition("=")[0] == "--run_dir" for word in words)
    paths = [Path(str(path)) for path in config.get("config") or [] if path is not None]
    if paths and paths[-1].name == "config.yaml" and (paths[-1].parent / "checkpoints").is_dir() and not is_named:
        return paths[-1].parent  # the run may have been moved since config.yaml was written
    return config.run_dir or Path("runs") / (paths[-1].stem if paths else "unnamed")


def _is_restarted() -> bool:
    """Return whether a scheduler has started this command before."""
    return any(os.environ.get(name, "0") not in ("", "0") for name in _RESTARTS)


def _as_yaml(parser: LightningArgumentParser, config: Any) -> str:
    config = config.clone()
    for option, value in _OF_ONE_START.items():
        config[option] = value
    text: str = parser.dump(config, skip_none=False)
    return text
