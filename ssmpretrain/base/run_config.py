"""Configuration of a run: config.yaml is read as plain data, and refused if no run can have written it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.whole_files import opened
from ssmpretrain.base.yaml_files import read_recipe

_MOST_VALUES = 200_000  # values in a file, with every alias of YAML written out

# Options for output, progress, saving, and distribution over machines. They do not change the result.
NOT_OF_THE_RESULT = frozenset({
    "config", "run_dir", "fresh", "allow_changes", "ckpt_path", "weights_only", "checkpoints",
    "rank_timeout",
    "data.init_args.num_workers",
    *(
        f"trainer.{name}"
        for name in (
            "accelerator", "strategy", "devices", "num_nodes", "logger", "callbacks", "fast_dev_run", "max_time",
            "num_sanity_val_steps", "log_every_n_steps", "enable_checkpointing", "enable_progress_bar",
            "enable_model_summary", "enable_autolog_hparams", "profiler", "detect_anomaly", "barebones",
            "default_root_dir", "model_registry", "limit_test_batches", "limit_predict_batches",
        )
    ),
})  # fmt: skip

_KINDS = {
    type(None): "nothing", str: "a text", int: "a number", float: "a number", bool: "true or false", list: "a list",
    dict: "options",
}  # fmt: skip


def read_config(path: Path) -> dict[str, Any]:
    """Read the configuration that a run was started with; no class that it names is imported.

    Returns:
        Options by name. In "model" and "data", if present, "class_path" is a text, and "init_args" and "dict_kwargs"
        are dictionaries or None. In "trainer", "callbacks" is a list of dictionaries of that form, or absent.

    Raises:
        UserError: If the file is missing or holds something else. The caller adds what to do.
    """
    try:
        with opened(path):  # refuses a pipe, which would block
            content = read_recipe(path)
    except FileNotFoundError:
        raise UserError(f"{path}: is missing.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
    if (wrong := _wrong(content)) is not None:
        raise UserError(f"{path}: is no configuration of a run ({wrong}).")
    trainer = content.get("trainer") or {}
    if isinstance(callbacks := trainer.get("callbacks"), dict):
        trainer["callbacks"] = [callbacks]
    return content


def _wrong(content: dict[str, Any]) -> str | None:
    """Return a phrase about the first value that no run writes; None if there is no such value."""
    if _values_in(content) > _MOST_VALUES:
        return f"it stands for more than {_MOST_VALUES:,} values"
    for name in ("model", "data", "trainer"):
        section = content.get(name)
        if section is not None and not isinstance(section, dict):
            return f"{name} has options; got {_kind(section)}"
        if name != "trainer" and section and (wrong := _wrong_class(name, section)):
            return wrong
    callbacks = (content.get("trainer") or {}).get("callbacks") or []
    callbacks = [callbacks] if isinstance(callbacks, dict) else callbacks
    if not isinstance(callbacks, list):
        return f"callbacks are a list; got {_kind(callbacks)}"
    for callback in callbacks:
        if not isinstance(callback, dict):
            return f"a callback has a class_path; got {_kind(callback)}"
        if wrong := _wrong_class("a callback", callback):
            return wrong
    return None


def _wrong_class(name: str, section: dict[str, Any]) -> str | None:
    if not isinstance(section.get("class_path"), str):
        return f"{name} has a class_path; got {_kind(section.get('class_path'))}"
    for arguments in ("init_args", "dict_kwargs"):
        if not isinstance(section.get(arguments) or {}, dict):
            return f"{name} has {arguments} by name; got {_kind(section[arguments])}"
    return None


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), type(value).__name__)


def _values_in(content: Any) -> int:
    """Count the values with each alias written out; stop soon after `_MOST_VALUES`."""
    waiting, count = [content], 0
    while waiting and count <= _MOST_VALUES:
        value = waiting.pop()
        count += 1
        if isinstance(value, dict | list):
            waiting += [*value, *value.values()] if isinstance(value, dict) else value
    return count
