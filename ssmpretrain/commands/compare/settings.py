"""Settings in which runs differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from ssmpretrain.base.run_config import NOT_OF_THE_RESULT

# Devices and nodes decide the global batch; a callback may take part in training.
_EXEMPT = NOT_OF_THE_RESULT - {"trainer.devices", "trainer.num_nodes", "trainer.callbacks"}
Settings = dict[str, Any]


def differing_settings(configs: Sequence[dict[str, Any]]) -> list[Settings]:
    """Return for each configuration its values of the settings that are not the same in all of them.

    A setting has the name of its option, as `model.encoder_args.depth`; one of a callback opens with
    `trainer.callbacks.NAME`. Options for output, saving and the like are left out. So are the arguments of classes that
    only some of the runs have: their `class_path` differs and is named, the arguments are not comparable.

    Args:
        configs: Configurations of runs, as `read_config` returns them.

    Returns:
        One dict for each configuration; a setting that it has not got is absent. First come the settings of the model,
        then those of data, trainer and the rest, last the callbacks; in each, those that all runs have come first.
    """
    flat = [dict(_options(_with_named_callbacks(config), "")) for config in configs]
    names = [name for name in dict.fromkeys(name for one in flat for name in one) if _is_compared(name, flat)]
    names.sort(key=lambda name: _place(name, flat))
    return [{_short(name): one[name] for name in names if name in one} for one in flat]


def _place(name: str, flat: Sequence[Settings]) -> tuple[float, bool]:
    sections = ("model.", "data.", "trainer.callbacks.")
    section = next((place for place, start in enumerate(sections) if name.startswith(start)), 1.5)
    return section, any(name not in one for one in flat)


def _is_compared(name: str, flat: Sequence[Settings]) -> bool:
    if any(name == exempt or _is_part(name, exempt) for exempt in _EXEMPT):
        return False
    values = [json.dumps(one[name], sort_keys=True, default=str) if name in one else None for one in flat]
    if len(set(values)) == 1:
        return False
    if any(_is_part(other, name) for one in flat for other in one):
        return False  # null in one run; its parts in another are named
    return None not in values or not _is_of_another_class(name, flat)


def _is_part(name: str, of: str) -> bool:
    return name.startswith((f"{of}.", f"{of}["))


def _is_of_another_class(name: str, flat: Sequence[Settings]) -> bool:
    """Return whether an argument belongs to a class that not all runs have."""
    parts = name.split(".")
    owners = (f"{'.'.join(parts[:end])}.class_path" for end in range(len(parts) - 1, 0, -1))
    for owner in owners:
        classes = {one.get(owner) for one in flat}
        if classes != {None} and owner != name:
            return len(classes) > 1
    return False


def _options(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the full name of each option and its value. A list is one value, unless it holds groups of options."""
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        for number, one in enumerate(value):
            yield from _options(one, f"{name}[{number}]")
        return
    if not isinstance(value, dict) or not value:
        yield name, value
        return
    for key, inner in value.items():
        yield from _options(inner, f"{name}.{key}" if name else str(key))


def _with_named_callbacks(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with the callbacks as options by the name of their class."""
    trainer = config.get("trainer") or {}
    callbacks = trainer.get("callbacks") or []
    named = {str(one["class_path"]).rpartition(".")[2]: one.get("init_args") or {} for one in callbacks}
    return {**config, "trainer": {**trainer, "callbacks": named}}


def _short(name: str) -> str:
    """Write an option as on a command line, without `init_args`."""
    return name.replace(".init_args.", ".")
