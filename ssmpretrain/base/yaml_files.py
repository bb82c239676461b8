"""YAML files that people write: recipes and configurations, with errors that name the file and the line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ssmpretrain.base.errors import UserError

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C where libyaml is there
_MOST_BYTES, _MOST_LEVELS = 1 << 22, 64  # a recipe has a few thousand bytes, and eight levels
_MOST_REPEATED = 100_000  # nodes that aliases add to the written ones
_MOST_DIGITS = 100  # 64 bits in binary, with a sign and underscores
_CHECKPOINT = "Give a checkpoint with --ckpt_path or --model.init_from, and a recipe with --config."
_SHARD = "Give data with --data.train, and a recipe with --config."
# Files that are no recipe: offset of their mark, the mark, their name, and the remedy.
_KINDS = (
    (0, b"PK\x03\x04", "a zip archive, as checkpoints are", _CHECKPOINT),
    (0, b"\x80", "a pickle, as old checkpoints are", _CHECKPOINT),
    (257, b"ustar", "a tar archive", _SHARD),
    (0, b"\x1f\x8b", "a gzip archive", _SHARD),
    (0, b"\xff\xd8\xff", "a JPEG image", _SHARD),
    (0, b"\x89PNG", "a PNG image", _SHARD),
    (0, b"\xff\xfe\0\0", "text in UTF-32", "Save it as UTF-8."),
    (0, b"\0\0\xfe\xff", "text in UTF-32", "Save it as UTF-8."),
    (0, b"\xff\xfe", "text in UTF-16", "Save it as UTF-8."),
    (0, b"\xfe\xff", "text in UTF-16", "Save it as UTF-8."),
)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Read a recipe or the configuration of a run as plain data; no class that it names is imported.

    Raises:
        OSError: If the file cannot be read.
        UserError: If the file is not a YAML text that sets options by name, each once.
    """
    text = _text_of(Path(path))
    _check_options(_checked(text, str(path)), str(path))
    try:
        content: dict[str, Any] = yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:  # a date such as 2026-02-31, a tag that names an object of Python
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}. Correct it there.") from error
    return content


def check_recipe(path: Path) -> None:
    """Raise the errors of `read_recipe`; skip a missing file, and a pipe, which can be read only once."""
    if path.exists() and not path.is_fifo():
        _check_options(_checked(_text_of(path), str(path)), str(path))


def check_value(text: str) -> None:
    """Check the YAML of an option, or of a file that an option names.

    Raises:
        UserError: If the content is endless, huge or contradictory; see `_check_nodes`.
        yaml.YAMLError: If the text is not YAML.
    """
    _check_depth(text)
    _check_nodes(yaml.compose(text, Loader=_Loader), where=f"{' '.join(text.split())[:60]!r}")


def _checked(text: str, where: str) -> yaml.Node | None:
    """Parse and check a YAML text, see `_check_nodes`; messages open with `where`."""
    try:
        _check_depth(text)
        node: yaml.Node | None = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f":{error.problem_mark.line + 1}"
        raise UserError(f"{where}{line}: not valid YAML: {error.problem}. Correct it there.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}. Correct it there.") from error
    _check_nodes(node, where)
    return node


def _check_options(node: yaml.Node | None, where: str) -> None:
    if not isinstance(node, yaml.MappingNode):
        found = "nothing" if node is None else "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
        raise UserError(
            f"{where}: a recipe sets options by name, as `trainer: {{max_epochs: 3}}`; got {found}. Give another file."
        )


def _check_depth(text: str) -> None:
    """Raise a YAMLError if there are so many levels that the composer, which recurses, would run out of stack."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MOST_LEVELS:
            raise yaml.MarkedYAMLError(problem=f"it has more than {_MOST_LEVELS} levels", problem_mark=event.start_mark)


def _check_nodes(node: yaml.Node | None, where: str) -> None:
    """Raise a UserError for endless or huge content, a value that nothing can take, or an option that is set twice."""
    if node is not None:
        _check_size(node, where, {})
        _check_keys(node, where)


def _check_size(node: yaml.Node, where: str, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Return the number of nodes and levels in `node`, with every alias written out.

    Args:
        node: The node to count.
        where: Opens the message.
        known: Results so far, by the id of the node; None while a node is being counted.
    """
    place = f"{where}:{node.start_mark.line + 1}"
    if id(node) in known:
        if (result := known[id(node)]) is None:
            raise UserError(
                f"{place}: an alias stands for what is written before it; got one inside what it names, which would "
                "never end. Write out what is meant."
            )
        return result
    if isinstance(node, yaml.ScalarNode):
        _check_word(node, place)
        known[id(node)] = 1, 0
        return 1, 0
    known[id(node)] = None
    parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
    sizes = [_check_size(part, where, known) for part in parts]
    count, levels = 1 + sum(count for count, _ in sizes), 1 + max((levels for _, levels in sizes), default=0)
    if count - len(known) > _MOST_REPEATED or levels > _MOST_LEVELS:
        raise UserError(
            f"{place}: with its aliases written out, a value has at most {_MOST_REPEATED:,} parts in {_MOST_LEVELS} "
            f"levels; got {f'{count:,}' if count < 10**15 else 'over 10^15'} in {levels}. Use fewer aliases."
        )
    known[id(node)] = count, levels
    return count, levels


def _check_word(node: yaml.ScalarNode, place: str) -> None:
    """Refuse a value that would fail far from here, in a call of the system or in arithmetic."""
    if "\0" in node.value:
        raise UserError(f"{place}: no text or path holds a NUL character; got {node.value[:60]!r}. Leave it out.")
    if node.tag == "tag:yaml.org,2002:int" and len(node.value) > _MOST_DIGITS:
        raise UserError(
            f"{place}: a whole number has at most 64 bits; got one of {len(node.value):,} characters, "
            f"{node.value[:20]}... Correct it there."
        )


def _check_keys(node: yaml.Node | None, where: str) -> None:
    """Raise a UserError if an option is set twice; a loader would silently take the last value."""
    for mapping in _mappings(node):
        lines: dict[str, int] = {}
        for name, line in _options(mapping, met=set()):
            if name in lines:
                raise UserError(
                    f"{where}:{line}: an option is set once; got {name} here and in line {lines[name]}. "
                    "Leave one of the two out."
                )
            lines[name] = line


def _options(node: yaml.MappingNode, met: set[int], prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yield the full name of each option, as `trainer.max_epochs`, whether nested or written with dots, and its line.

    Args:
        node: A mapping.
        met: Ids of the mappings seen so far; the options of an alias count once.
        prefix: Opens the names.
    """
    met.add(id(node))
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            name = prefix + (key.value if key.tag.endswith(":str") else repr((key.tag, key.value)))
            yield name, key.start_mark.line + 1
            if isinstance(value, yaml.MappingNode) and id(value) not in met:
                yield from _options(value, met, name + ".")


def _mappings(node: yaml.Node | None) -> Iterator[yaml.MappingNode]:
    """Yield all mappings, each once."""
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
    """Read the text of a file that should be a recipe."""
    if path.exists() and not path.is_file():
        raise _not_a_recipe(path, "a folder" if path.is_dir() else "a device", "Give a file.")
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise _not_a_recipe(path, f"{size:,} bytes", "Give another file.")
    content = path.read_bytes()
    for place, mark, kind, remedy in _KINDS:
        if content.startswith(mark, place):
            raise _not_a_recipe(path, kind, remedy)
    if b"\0" in content:
        raise _not_a_recipe(path, *_with_zeros(content))
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        found = f"byte {content[error.start]:#04x} in line {line}, as in Latin-1 or Windows-1252"
        raise _not_a_recipe(path, found, "Save it as UTF-8.") from None


def _with_zeros(content: bytes) -> tuple[str, str]:
    """Return what a file with zero bytes is, and the remedy.

    English text has one zero in two bytes in UTF-16, and three in four in UTF-32.
    """
    share = content[:4096].count(0) / len(content[:4096])
    if 0.4 < share <= 0.8:
        return f"text in UTF-{16 if share < 0.6 else 32}", "Save it as UTF-8."
    return f"a zero byte in line {content.count(10, 0, content.index(0)) + 1}", "Give another file."


def _not_a_recipe(path: Path, found: str, remedy: str) -> UserError:
    return UserError(f"{path}: a recipe is YAML, text in UTF-8; got {found}. {remedy}")
