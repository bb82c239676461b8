"""Differences between two configurations of a run that change the run's result."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator
from itertools import zip_longest
from typing import Any

import yaml
from lightning.pytorch.cli import LightningArgumentParser

from ssmpretrain.base.run_config import NOT_OF_THE_RESULT
from ssmpretrain.run.start.observers import package_and_class

# Factors of the global batch. Only their product is compared.
BATCH_OPTIONS = ("data.init_args.batch_size", "trainer.accumulate_grad_batches")
# Options that matter only when a run starts, by their last word. A continued run ignores them.
_OF_THE_START = {
    "seed_everything",
    "init_from",
    "init_both_towers",
    "head_init_std",
    "init_logit_scale",
    "init_logit_bias",
}
_ABSENT = object()


def changes(old: dict[str, Any], new: dict[str, Any], same_batch: bool, observers: Collection[str]) -> list[str]:
    """Return one line for each option that differs, such as `model.init_args.mask_ratio: 0.75 -> 0.6`.

    Args:
        old: Stored configuration of the run, as plain data.
        new: Configuration of this command, as plain data.
        same_batch: Whether the caller compares the global batch itself, so that its factors may differ.
        observers: Callbacks that do not change the result and may differ, as `observers` returns them.
    """
    exempt = NOT_OF_THE_RESULT | set(BATCH_OPTIONS if same_batch else ())
    found = [
        *_differences(old, new, "", exempt),
        *_differences(_taking_part(old, observers), _taking_part(new, observers), _CALLBACKS, set()),
    ]
    return [f"{option}: {_short(before)} -> {_short(after)}{_effect(option)}" for option, before, after in found]


_CALLBACKS = "trainer.callbacks"


def with_defaults(parser: LightningArgumentParser, now: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """Return the stored configuration of a run, completed with the defaults of options that later versions added.

    Options without a class, where this version names one, are those of the default class: `schedule: {warmup_epochs:
    5}` is of `Cosine`.

    The defaults come from the classes that the configuration of this command names. A class that only the stored
    configuration names is compared by its name and never imported.

    Args:
        parser: Parser of this command.
        now: Configuration of this command, as plain data.
        old: Stored configuration of the run, as plain data.
    """
    try:
        known = parser.parse_object(_without_unknown(now, old))
        filled = yaml.safe_load(parser.dump(known, skip_none=False))
    except (argparse.ArgumentError, ValueError, TypeError, KeyError):  # an option that has no default
        return old
    return dict(_together(old, filled))


def _without_unknown(config: Any, other: Any) -> Any:
    """Return the options of `config` that `other` has too, whatever their values. Items of lists match by class."""
    if isinstance(config, list) and isinstance(other, list):
        return [_without_unknown(one, _namesake(one, other)) for one in config]
    if not (isinstance(config, dict) and isinstance(other, dict)):
        return config
    return {
        name: _without_unknown(value, other[name])
        for name, value in config.items()
        if name in other and not _lacks_class(other[name], value)
    }


def _together(one: Any, other: Any) -> Any:
    """Merge two sets of options. Where both have an option, the value of `one` counts."""
    if isinstance(one, list) and isinstance(other, list):
        return [_together(value, _namesake(value, other)) for value in one]
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return one
    if _lacks_class(one, other):
        one = {"class_path": other["class_path"], "init_args": one}
    return {**other, **{name: _together(value, other.get(name)) for name, value in one.items()}}


def _lacks_class(one: Any, other: Any) -> bool:
    """Return whether `other` names a class for its options, and `one` gives options without a class."""
    both = isinstance(one, dict) and isinstance(other, dict)
    return both and "class_path" in other and "class_path" not in one


def _namesake(one: Any, others: list[Any]) -> Any:
    """Return the item of a list that has the class of `one`, or `one` if there is no such item."""
    if not isinstance(one, dict) or "class_path" not in one:
        return one
    same = (other for other in others if isinstance(other, dict) and other.get("class_path") == one["class_path"])
    return next(same, one)


def _effect(option: str) -> str:
    """Return a remark for a changed option without effect; an empty text for any other option."""
    return " (no effect: only the start of a run reads it)" if option.rsplit(".", 1)[-1] in _OF_THE_START else ""


def _differences(old: Any, new: Any, option: str, exempt: Collection[str]) -> Iterator[tuple[str, Any, Any]]:
    if option in exempt or old == new:
        return
    if _is_of_groups(old) and _is_of_groups(new):
        for number, (before, now) in enumerate(zip_longest(old, new, fillvalue=_ABSENT)):
            yield from _differences(before, now, f"{option}[{number}]", exempt)
    elif not (isinstance(old, dict) and isinstance(new, dict)):
        yield option, old, new
    elif old.get("class_path") != new.get("class_path"):  # arguments of two classes are not compared
        yield f"{option}.class_path", old.get("class_path", _ABSENT), new.get("class_path", _ABSENT)
    else:
        for name in dict.fromkeys([*old, *new]):
            inner = f"{option}.{name}" if option else str(name)
            yield from _differences(old.get(name, _ABSENT), new.get(name, _ABSENT), inner, exempt)


def _is_of_groups(value: Any) -> bool:
    """Return whether a value is a list of groups of options, such as `data.views`."""
    return isinstance(value, list) and len(value) > 0 and all(isinstance(one, dict) for one in value)


def _taking_part(config: dict[str, Any], observers: Collection[str]) -> dict[str, Any]:
    """Return the arguments of the callbacks that take part in training, by name."""
    callbacks = (config.get("trainer") or {}).get("callbacks") or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    paths = {str(one["class_path"]): one.get("init_args") or {} for one in callbacks}
    taking_part = (path for path in paths if package_and_class(path) not in observers)
    return {path.rpartition(".")[2]: paths[path] for path in taking_part}


def _short(value: Any) -> str:
    if value is _ABSENT:
        return "(not there)"
    text = "null" if value is None else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
