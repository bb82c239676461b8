"""Errors of jsonargparse in one line: the option, the values it takes, and the value that was given.

jsonargparse has one class for all its errors, so they are recognised by their text.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import typing
from collections.abc import Iterable
from pathlib import Path

from ssmpretrain.base.wording import nearest

_UNKNOWN_OPTION = re.compile(r"Option '([^']+)' is not accepted|does not accept option '([^']+)'")
_NOT_FINITE = re.compile(r"(?<![\w.'])[-+]?(nan|inf)(?![\w.'])", re.IGNORECASE)
_CORRECT = "Correct it in the recipe or on the command line."
# Words for the types that jsonargparse names.
_KINDS = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "str": "a word", "dict": "options by name",
    "list": "a list", "tuple": "a list", "collections.abc.Iterable": "a list", "pathlib.Path": "a path",
}  # fmt: skip
# Examples of a class for the options that take one.
_EXAMPLES = {
    "model": "ssmpretrain.objectives.MAE",
    "data": "ssmpretrain.datamodules.ImageShards",
    "trainer.callbacks": "ssmpretrain.callbacks.EMA",
    "trainer.logger": "lightning.pytorch.loggers.CSVLogger",
    "model.schedule": "ssmpretrain.training.optim.Poly",
    "model.head": "ssmpretrain.objectives.dense.heads.UPerNet",
    "model.auxiliary": "ssmpretrain.objectives.dense.heads.FCN",
}


def parse_error(text: str, config_files: Iterable[Path]) -> str:
    """Return a short message for an error of jsonargparse, whose own message lists every type that it tried.

    Args:
        text: The text of the error.
        config_files: Recipes of this run, searched for the line of an unknown option.
    """
    lines = [line.strip(" -") for line in text.splitlines() if line.strip()]
    option = ".".join(dict.fromkeys(match[1] for line in lines if (match := re.match(r'Parser key "([^"]+)":', line))))
    if match := _UNKNOWN_OPTION.search(text):
        return _unknown_option(next(group for group in match.groups() if group), option, text, config_files)
    if match := re.search(r"the following arguments are required: (.+)", text):
        return _missing(match[1], option, text)
    if text.startswith("Problems parsing config"):
        where = " ".join(str(path) for path in config_files)
        return f"{where}: not valid YAML: {' '.join(text.split(':', 1)[1].split())}. {_CORRECT}"
    if match := re.search(r"unrecognized arguments: (.+)", text):
        unknown = match[1].split()[0].split("=")[0].lstrip("-")
        return _unknown_option(unknown, option, text, ())
    if match := re.search(r"argument (?:-c/)?--([\w.]+): expected one argument", text):
        return f"{match[1]}: takes a value; got none. Give it one, or leave it out."
    if match := re.search(r"Parser key \"config\": File does not exist: '?([^']+)'?", text):
        return f"{match[1]}: no such recipe. `python -m ssmpretrain recipes` lists those that come with the package."
    if match := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", text):
        module = importlib.import_module(match[1])
        classes = (name for name, value in vars(module).items() if isinstance(value, type) and name[0] != "_")
        names = getattr(module, "__all__", None) or list(classes)
        return f"class_path {match[1]}.{match[2]}: no such class. {nearest(match[2], names, 'That module has')}"
    given = _given(text)
    if match := re.search(r"(?:Import path (\S+) )?does not correspond to a subclass of (\w+)", text):
        return f"{option}: takes a class derived from {match[2]}; got {match[1] or given!r}. {_example(option)}"
    if match := re.search(r"Expected a dot import path string:(.*)", text):
        return f"{option}: takes a class by its full name; got {match[1].strip()!r}. {_example(option)}"
    if match := re.search(r"(?:import path|Unexpected import path format|No module named) ?:? ?'?([\w.]+)'?", text):
        told = f"takes a class by its full name; got {match[1]!r}, which cannot be imported"
        return f"{option or 'class_path'}: {told}. {_example(option)}"
    if match := re.search(r"Unable to load config \"(.*)\"|Unexpected config: ?(.*)", text):
        return f"{option or 'config'}: takes options by name; got {match[1] or match[2]!r}. {_CORRECT}"
    if match := re.search(r"Not of type \w+: (.+) does not conform to restriction (.+)", text):
        return f"{option}: is {match[2].replace('v', '')}; got {match[1]}. {_CORRECT}"
    if match := re.search(r"Not of type \w+: could not convert string to float: '(.*)'", text):
        return f"{option}: takes a number; got {match[1]!r}. {_CORRECT}"
    kinds = [
        _type_name(match) for match in re.finditer(r"Expected an? (.+?)(?:\. Got value: .*)?$", text, re.MULTILINE)
    ]
    kinds = [kind for kind in dict.fromkeys(kinds) if kind]
    if "a number" in kinds and _NOT_FINITE.search(given):
        return f"{option}: is a finite number; got {given}. {_CORRECT}"
    if kinds:
        return f"{option or 'recipe'}: takes {' or '.join(kinds)}; got {given!r}. {_CORRECT}"
    if lines[-1].startswith("Given value"):
        if option in _EXAMPLES:
            told = "takes a class by its full name, or class_path with init_args"
            return f"{option}: {told}; got {given!r}. {_example(option)}"
        return f"{option or 'recipe'}: the value is of a kind that fits there; got {given!r}. {_CORRECT}"
    told = lines[-1].partition('":')[2].strip() if lines[-1].startswith("Parser key") else lines[-1]
    if "; got " in told:  # one of our own messages
        return f"{option or 'recipe'}: {told}"
    return f"{option or 'recipe'}: {told.rstrip('.')}. {_CORRECT}"


def _missing(names: str, option: str, text: str) -> str:
    """Return the message for missing arguments of the command, or of the class that an option names."""
    inside = re.search(r"given class_path '(?:[\w.]+\.)?(\w+)'", text)
    if inside is None:
        names = re.sub(r"\b(fit|validate)\.", "", names)
        return f"{names} not set. Give a recipe, e.g. --config recipes/quickstart.yaml"
    first = names.split(",")[0]
    return f"{option}: {inside[1]} needs {names}; got nothing. Add --{option}.{first}, or set it in the recipe."


def _given(text: str) -> str:
    """Return the value that did not fit, as it was given."""
    if match := re.search(r"NestedArg\(key='[^']*', val=(.+)\)$", text, flags=re.MULTILINE):
        given = match[1].strip("'")
    else:
        values = re.findall(r"(?:Given value|Got value):(.*)$", text, flags=re.MULTILINE)
        values = [value.strip() for value in values if not value.strip().startswith(("Namespace", "NestedArg"))]
        given = values[0] if values else ""
    return given if len(given) <= 80 else given[:77] + "..."


def _type_name(expected: re.Match[str]) -> str:
    """Return a readable name for a type that jsonargparse expected; an empty text for None, to leave it out."""
    kind = re.sub(r"<class '([\w.]+)'>", r"\1", expected[1])
    if match := re.search(r"Literal\[(.+)\]", kind):
        return "one of " + match[1].replace("'", "")
    if kind == "NoneType" or kind.startswith("path but"):
        return ""
    name, _, more = kind.partition(" ")
    return f"{_KINDS.get(name, name)} {more}".rstrip()


def _example(option: str) -> str:
    return f"Give a class in full, e.g. {_EXAMPLES.get(option, _EXAMPLES['model'])}."


def _unknown_option(option: str, inside: str, text: str, config_files: Iterable[Path]) -> str:
    """Return the message for an unknown option; `inside` is the option of the class that does not take it, or empty."""
    if option == "class_path":
        return "class_path: the options of a class stand under init_args; got some beside class_path. Move them there."
    if (group := re.search(r"Group '([^']+)' does not accept", text)) and not option.startswith(f"{group[1]}."):
        option = f"{group[1]}.{option}"
    word, known = _known_options(text, option)
    full = option if not inside or option.startswith(f"{inside.split('.')[0]}.") else f"{inside}.{option}"
    where = _line_of(option.rsplit(".", 1)[-1], config_files)
    if not known:
        name = re.findall(r"given class_path '(?:[\w.]+\.)?(\w+)'", text)[-1]
        return f"{where}{full}: {name} takes no options. Leave it out, or name another class by class_path."
    return f"{where}{full}: no such option. {nearest(word, known, 'Known options')}"


def _line_of(key: str, config_files: Iterable[Path]) -> str:
    """Return `file:line: ` of the first place where a recipe sets `key`, or an empty text."""
    for path in config_files:
        for number, line in enumerate(path.read_text().splitlines() if path.is_file() else (), start=1):
            if re.search(rf"(^|[\s{{,]){re.escape(key)}\s*:", line.split("#")[0]):
                return f"{path}:{number}: "
    return ""


def _known_options(text: str, option: str) -> tuple[str, list[str]]:
    """Return the part of an unknown option that is wrong, and the options that are valid there."""
    if classes := re.findall(r"given class_path '([\w.]+)'", text):  # from the outermost to the innermost
        module, _, name = classes[-1].rpartition(".")
        cls = getattr(importlib.import_module(module), name)
        *groups, word = option.split(".")
        for group in groups:
            if (nested := _settings_of(cls, group)) is None:
                return group, _options_of(cls)
            cls = nested
        return word, _options_of(cls)
    from lightning.pytorch import Trainer

    trainer = [f"trainer.{name}" for name in inspect.signature(Trainer.__init__).parameters if name != "self"]
    known = ["config", "model", "data", "run_dir", "fresh", "allow_changes", "ckpt_path", "seed_everything", *trainer]
    first = option.split(".")[0]
    return option if first in {name.split(".")[0] for name in known} else first, known


def _settings_of(cls: type, name: str) -> type | None:
    """Return the dataclass that is an argument of a class, or None."""
    hints = (typing.get_type_hints(base.__init__) for base in cls.__mro__)  # type: ignore[misc]
    hint = next((of_class[name] for of_class in hints if name in of_class), None)  # also of a parent class
    return next(
        (one for one in (hint, *typing.get_args(hint)) if isinstance(one, type) and dataclasses.is_dataclass(one)), None
    )


def _options_of(cls: type) -> list[str]:
    """Return the arguments of a class."""
    taken: list[str] = []
    for base in cls.__mro__:  # **kwargs stands for the arguments of the parent class
        parameters = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
        taken += [one.name for one in parameters if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]
        if not any(one.kind is one.VAR_KEYWORD for one in parameters):
            break
    return [name for name in dict.fromkeys(taken) if name != "self"]
