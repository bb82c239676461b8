"""Options of Lightning's Trainer and its callbacks: their allowed values, and the reasons for refused ones."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities import rank_zero_only

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.wording import nearest

_log = logging.getLogger(__name__)
_CORRECT = "Correct it in the recipe or on the command line."
_MOST = 10**12  # greatest count, e.g. of steps; torch cannot compute with much larger ones
_MOST_RANKS = max(64, 4 * (os.cpu_count() or 1))  # processes that one command starts on one machine
# Least value of each number. Smaller values fail in the middle of a run, or silently mean "never".
_LEAST = {
    "num_nodes": 1, "fast_dev_run": 0, "max_epochs": -1, "min_epochs": 0, "max_steps": -1, "min_steps": 0,
    "check_val_every_n_epoch": 1, "num_sanity_val_steps": -1, "log_every_n_steps": 1, "accumulate_grad_batches": 1,
    "gradient_clip_val": 0, "reload_dataloaders_every_n_epochs": 0,
}  # fmt: skip
# Options that take a fraction of the batches or their number; True if 0 (no batches) is allowed.
_BATCHES = {
    "limit_train_batches": False, "limit_val_batches": True, "limit_test_batches": True,
    "limit_predict_batches": True, "overfit_batches": True, "val_check_interval": False,
}  # fmt: skip
_DEVICES = re.compile(r"auto|-?\d+|\[?\s*\d+(\s*,\s*\d+)*\s*,?\s*\]?")
_PROFILERS = ("simple", "advanced", "pytorch")
_CLIPPING = ("norm", "value")

_NO_RANKS = re.compile("spawn|fork|notebook|xla")  # strategies whose ranks `Launcher` cannot watch

# Options of the Trainer without effect in a run of this package, and the reason.
_WITHOUT_EFFECT = {
    "default_root_dir": "a run writes to --run_dir",
    "model_registry": "a run's checkpoints go to its folder alone",
    "limit_test_batches": "there is no test",
    "limit_predict_batches": "there is no prediction; see the command embed",
}

# Callbacks of Lightning that a run refuses, with the reason; classes derived from them are refused too. All other
# callbacks of Lightning work as documented.
REFUSED_CALLBACKS = {
    "BackboneFinetuning": "it looks for a `backbone`, which no objective has. Use model.layer_decay of Finetune.",
    "BasePredictionWriter": "there is no prediction here. Use the command embed.",
    "BatchSizeFinder": "it ends the run after its trials, and the learning rate follows the batch. Try "
    "--data.batch_size with --trainer.fast_dev_run 2.",
    "GradientAccumulationScheduler": "learning rate, schedule and the order of the data follow one global batch. Set "
    "--trainer.accumulate_grad_batches for the whole run.",
    "LearningRateFinder": "it sets an attribute `lr`, which no objective has. Try --model.optimizer.lr_per_256 with "
    "--trainer.max_steps.",
    "ModelPruning": "it renames parameters, so that no other command can read the run. Prune what was exported.",
    "StochasticWeightAveraging": "it replaces the schedule and copies an unfinished model. Use "
    "ssmpretrain.callbacks.EMA.",
}
# Base classes that do nothing by themselves.
BASE_CALLBACKS = ("BaseFinetuning", "Callback", "Checkpoint", "ProgressBar")


def check_options(settings: Any) -> None:
    """Raise a UserError if an option of the Trainer is out of range or refused; warn about options without effect.

    Args:
        settings: Parsed options by name: numbers, words, and the objects that a recipe builds.
    """
    if not hasattr(settings, "get"):
        raise UserError(f"trainer: takes options by name, as `{{max_epochs: 3}}`; got {settings!r:.80}. {_CORRECT}")
    for name, least in _LEAST.items():
        value = settings.get(name)
        if _is_number(value) and not least <= value <= _MOST:
            raise _wrong(name, f"is a number of at least {least}" + _never(name), value)
    for name, may_be_none in _BATCHES.items():
        _check_batches(name, settings.get(name), may_be_none)
    for name, words in (
        ("gradient_clip_algorithm", _CLIPPING),
        ("profiler", _PROFILERS),
        ("strategy", ("auto", *(one for one in StrategyRegistry.available_strategies() if not _NO_RANKS.search(one)))),
        ("accelerator", ("auto", "gpu", *sorted(AcceleratorRegistry.available_accelerators()))),
    ):
        value = settings.get(name)
        if isinstance(value, str) and value not in words:
            raise UserError(
                f"trainer: {name} is one of a few words; got {value!r}. {nearest(value, words, 'They are')}"
            )
    if settings.get("barebones"):
        raise UserError(
            "trainer: barebones forbids the log, the checkpoints and the progress that every run has; got true. "
            "Leave it out."
        )
    _check_devices(settings.get("devices"))
    for lower, upper in (("min_epochs", "max_epochs"), ("min_steps", "max_steps")):
        floor, ceiling = settings.get(lower), settings.get(upper)
        if floor is not None and ceiling not in (None, -1) and floor > ceiling:
            raise _wrong(lower, f"is at most trainer.{upper}, which is {ceiling}", floor)
    if settings.get("gradient_clip_algorithm") and not settings.get("gradient_clip_val"):
        rank_zero_only(_log.warning)("trainer.gradient_clip_algorithm has no effect without trainer.gradient_clip_val")
    for name, instead in _WITHOUT_EFFECT.items():
        if settings.get(name) not in (None, 1.0):
            rank_zero_only(_log.warning)("trainer.%s has no effect: %s", name, instead)


def check_callbacks(callbacks: list[Callback]) -> None:
    """Raise a UserError if a callback of Lightning cannot work as documented in a run of this package."""
    for callback in callbacks:
        for kind in type(callback).__mro__:
            if kind.__module__.startswith("lightning.") and (why := REFUSED_CALLBACKS.get(kind.__name__)):
                raise UserError(f"trainer.callbacks: {kind.__name__} is not taken: {why}")
        kind = type(callback)
        if kind.__module__.startswith("lightning.") and kind.__name__ in BASE_CALLBACKS:
            raise UserError(
                f"trainer.callbacks: {kind.__name__} is a base class and does nothing. Give a class derived from it."
            )


def check_numbers(config: dict[str, Any]) -> None:
    """Raise a UserError if a number for a class of this package is infinite, NaN, or longer than 64 bits.

    Args:
        config: Nested options by name, as plain data.
    """
    for name, value in _numbers(config, ""):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name}: is a finite number; got {value}. {_CORRECT}")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise UserError(f"{name}: is a number of at most 64 bits; got {value}. {_CORRECT}")


def _numbers(config: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(config, dict):
        if not str(config.get("class_path", "ssmpretrain.")).startswith("ssmpretrain."):
            return  # a class of another package checks its own numbers
        for key, value in config.items():
            part = "" if key in ("init_args", "dict_kwargs") else f".{key}"
            yield from _numbers(value, f"{name}{part}".lstrip("."))
    elif isinstance(config, list | tuple):
        for value in config:
            yield from _numbers(value, name)
    elif _is_number(config):
        yield name, config


def _check_batches(name: str, value: Any, may_be_none: bool) -> None:
    if not _is_number(value):
        return
    whole = 1 <= value <= _MOST and value == int(value)
    if whole or (isinstance(value, float) and 0 < value < 1) or (value == 0 and may_be_none):
        return
    start = "[0" if may_be_none else "(0"
    raise _wrong(name, f"is a fraction of the batches in {start}, 1] or their number", value)


def _check_devices(devices: Any) -> None:
    """Raise unless `devices` is a number, a list of numbers or "auto", and so many processes can be started."""
    if isinstance(devices, float) or (isinstance(devices, str) and not _DEVICES.fullmatch(devices)):
        raise _wrong("devices", "is a whole number, a list of devices such as 0,1, or auto", repr(devices))
    if isinstance(devices, str) and devices.lstrip("-").isdigit():
        devices = int(devices)
    if not _is_number(devices) or devices == -1:
        return
    if not 1 <= devices <= (_MOST if "WORLD_SIZE" in os.environ else _MOST_RANKS):
        raise _wrong("devices", f"is a number from 1 to {_MOST_RANKS} on this machine, -1 or auto", devices)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _never(name: str) -> str:
    return ", or null for never" if name == "check_val_every_n_epoch" else ""


def _wrong(name: str, what: str, value: Any) -> UserError:
    return UserError(f"trainer: {name} {what}; got {value}. {_CORRECT}")
