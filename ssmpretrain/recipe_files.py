"""Recipes and configurations: YAML files that people write, read with errors that name the file and the line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C where libyaml is there
_MOST_BYTES, _MOST_LEVELS = 1 << 22, 64  # a recipe has a few thousand bytes, and eight levels
_CHECKPOINT = "Give a checkpoint with --ckpt_path or --model.init_from, and a recipe with --config."
_SHARD = "Give data with --data.train, and a recipe with --config."
# What is given in the place of a recipe: where its mark stands, the mark, its name, and what to do.
_KINDS = (
    (0, b"PK\x03\x04", "a zip archive, as checkpoints are", _CHECKPOINT),
    (0, b"\x80", "a pickle, as old checkpoints are", _CHECKPOINT),
    (257, b"ustar", "a tar archive", _SHARD),
    (0, b"\x1f\x8b", "a gzip archive", _SHARD),
    (0, b"\xff\xd8\xff", "a JPEG image", _SHARD),
    (0, b"\x89PNG", "a PNG image", _SHARD),
    (0, b"\xff\xfe", "text in UTF-16", "Save it as UTF-8."),
    (0, b"\xfe\xff", "text in UTF-16", "Save it as UTF-8."),
)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Read a recipe or a run's configuration as plain data; no class in it is imported.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no YAML text that sets options by name, each once.
    """
    text = _text_of(Path(path))
    _check_options(_checked(text, str(path)), str(path))
    try:
        content: dict[str, Any] = yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:  # a date such as 2026-02-31, a tag that names an object of Python
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}. Correct it there.") from error
    return content


def check_recipe(path: Path) -> None:
    """Raise as `read_recipe` does, but for a file that is not there, and a pipe, which can be read only once."""
    if path.exists() and not path.is_fifo():
        _check_options(_checked(_text_of(path), str(path)), str(path))


def check_value(text: str) -> None:
    """Raise a ValueError if YAML in an option, or in a file that an option names, sets a key twice."""
    if ":" in text:
        _check_keys(yaml.compose(text, Loader=_Loader), where=f"{' '.join(text.split())[:60]!r}")


def _checked(text: str, where: str) -> yaml.Node | None:
    """The content of a YAML text in which no key is set twice; messages open with `where`."""
    try:
        _check_depth(text)
        node: yaml.Node | None = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f":{error.problem_mark.line + 1}"
        raise ValueError(f"{where}{line}: not valid YAML: {error.problem}. Correct it there.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not valid YAML: {' '.join(str(error).split())}. Correct it there.") from error
    _check_keys(node, where)
    return node


def _check_options(node: yaml.Node | None, where: str) -> None:
    if not isinstance(node, yaml.MappingNode):
        found = "nothing" if node is None else "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
        raise ValueError(
            f"{where}: a recipe sets options by name, as `trainer: {{max_epochs: 3}}`; got {found}. Give another file."
        )


def _check_depth(text: str) -> None:
    """Raise a YAMLError where the composer, which calls itself at each level, would run out of stack."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MOST_LEVELS:
            raise yaml.MarkedYAMLError(problem=f"it has more than {_MOST_LEVELS} levels", problem_mark=event.start_mark)


def _check_keys(node: yaml.Node | None, where: str) -> None:
    """Raise a ValueError if an option is set twice: of two values, a loader would take the last without a word."""
    for mapping in _mappings(node):
        lines: dict[str, int] = {}
        for name, line in _options(mapping, met=set()):
            if name in lines:
                raise ValueError(
                    f"{where}:{line}: an option is set once; got {name} here and in line {lines[name]}. "
                    "Leave one of the two out."
                )
            lines[name] = line


def _options(node: yaml.MappingNode, met: set[int], prefix: str = "") -> Iterator[tuple[str, int]]:
    """Names of options, as `trainer.max_epochs`, and their lines: nested, or written with dots as they may be.

    Args:
        node: A mapping.
        met: Of mappings, where their content was named: an alias does not name it again.
        prefix: Of the names.
    """
    met.add(id(node))
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            name = prefix + (key.value if key.tag.endswith(":str") else repr((key.tag, key.value)))
            yield name, key.start_mark.line + 1
            if isinstance(value, yaml.MappingNode) and id(value) not in met:
                yield from _options(value, met, name + ".")


def _mappings(node: yaml.Node | None) -> Iterator[yaml.MappingNode]:
    """All mappings, each once."""
    met: set[int] = set()
    left = [node]
    while left:
        one = left.pop()
        if one is None or id(one) in met:
            continue
        met.add(id(one))
        if isinstance(one, yaml.MappingNode):
            yield one
            left += [part for pair in one.value for part in pair]
        elif isinstance(one, yaml.SequenceNode):
            left += one.value


def _text_of(path: Path) -> str:
    """The text of a file that should be a recipe."""
    if path.exists() and not path.is_file():
        raise _not_a_recipe(path, "a folder" if path.is_dir() else "a device", "Give a file.")
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise _not_a_recipe(path, f"{size:,} bytes", "Give another file.")
    content = path.read_bytes()
    for place, mark, kind, remedy in _KINDS:
        if content.startswith(mark, place):
            raise _not_a_recipe(path, kind, remedy)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        found = f"byte {content[error.start]:#04x} in line {line}, as in Latin-1"
        raise _not_a_recipe(path, found, "Save it as UTF-8.") from None


def _not_a_recipe(path: Path, found: str, remedy: str) -> ValueError:
    return ValueError(f"{path}: a recipe is YAML, text in UTF-8; got {found}. {remedy}")
