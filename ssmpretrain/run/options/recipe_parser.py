"""The parser of recipes and command-line options: the parser of jsonargparse with stricter rules."""

from __future__ import annotations

from enum import Enum
from importlib import import_module
from typing import Any

import yaml
from jsonargparse import _typehints, get_loader, set_dumper, set_loader
from lightning.pytorch.cli import LightningArgumentParser

from ssmpretrain.base.yaml_files import check_value
from ssmpretrain.training.settings import Settings

_MODE = "recipe"  # name of our mode of reading and writing YAML, beside jsonargparse's own modes


class RecipeParser(LightningArgumentParser):
    """Parse recipes and options; refuse options that a recipe sets twice, and abbreviated options.

    With abbreviations, `--model.optimizer.lr 1` would set `lr_per_256`. Errors are raised, and
    `ssmpretrain.run.messages` explains them; jsonargparse would print its usage and exit.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        strict = {"allow_abbrev": False, "exit_on_error": False, "parser_mode": _MODE}
        super().__init__(*args, **{**strict, **kwargs})


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Write a member of an enumeration as its value; some defaults of Lightning are such members."""


_Dumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))


def _load(text: str) -> Any:
    """Read a value in YAML as jsonargparse does, but refuse a key that is set twice."""
    check_value(text)
    return get_loader("yaml")(text)


def _dump(data: Any) -> str:
    text: str = yaml.dump(data, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)
    return text


set_loader(_MODE, _load, exceptions=(yaml.YAMLError,))
set_dumper(_MODE, _dump)


_keep_options_of_same_name: Any = _typehints.discard_init_args_on_class_path_change


def _begin_anew(parser: Any, before: Any, now: Any) -> None:
    """Let settings of another kind begin with their own defaults.

    When a class changes, jsonargparse keeps all options that both classes have: a `Poly` without a warm-up would get
    that of the default `Cosine`. It has no public option for this.
    """
    if before and "init_args" in before and before["class_path"] != now["class_path"]:
        module, _, name = now["class_path"].rpartition(".")
        kind = getattr(import_module(module), name, None)
        if isinstance(kind, type) and issubclass(kind, Settings):
            for option in list(before["init_args"].keys()):
                del before["init_args"][option]
    _keep_options_of_same_name(parser, before, now)


_typehints.discard_init_args_on_class_path_change = _begin_anew
