"""Index of a folder: one file that describes all its shards, so that a run starts without opening each of them.

`index.json` is the format of this package. It holds the index of each shard without the offsets. `_info.json` of timm
and `sizes.json` of open_clip hold only the numbers of samples.
"""

import logging
import os
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ssmpretrain.base.byte_sizes import show_size
from ssmpretrain.base.errors import DataError
from ssmpretrain.base.whole_files import replace_json
from ssmpretrain.datamodules.files.local_files import MOST_INDEX, read_within
from ssmpretrain.datamodules.files.patience import may_pass
from ssmpretrain.datamodules.shards.other_readers import OPEN_CLIP, TIMM, is_ours, write_for_others
from ssmpretrain.datamodules.tar.headers import BLOCK
from ssmpretrain.datamodules.tar.index import ShardIndex, contents_of, index_from, parse_json
from ssmpretrain.datamodules.tar.index_flaws import find_flaw, is_count

_log = logging.getLogger(__name__)
NAME = "index.json"
COUNT_NAMES = (TIMM, OPEN_CLIP)
_FORMAT = "ssmpretrain shards"
_VERSION = 1
_HEAD = 4096  # the name of the format stands in the first bytes of the file


def write_folder_indexes(indexes: Iterable[ShardIndex]) -> None:
    """Write `index.json` and the files of other readers into each folder of these shards.

    Entries of other shards in an existing `index.json` are kept if these shards have not changed.

    Raises:
        DataError: If a folder has an `index.json` that is not an index of shards.
    """
    folders: defaultdict[Path, dict[str, Any]] = defaultdict(dict)
    for index in indexes:
        assert isinstance(index.path, Path), index.path
        folders[index.path.parent][index.path.name] = contents_of(index)
    for folder, written in folders.items():
        present = {item.name for item in os.scandir(folder)}
        others: dict[str, Any] = {}
        if NAME in present:
            if (found := folder_entries(folder)) is None:
                raise DataError(
                    f"{folder / NAME}: is not an index of shards, and is not overwritten. Rename it, or give the "
                    "shards a folder of their own."
                )
            trusted = (index for name, index in found.items() if index is not None and name not in written)
            others = {index.path.name: contents_of(index) for index in trusted}
        content = dict(sorted({**others, **written}.items()))
        replace_json(folder / NAME, {"format": _FORMAT, "version": _VERSION, "shards": content}, indent=None)
        write_for_others(folder, {name: index["samples"] for name, index in content.items()})


def describe_folder(folder: Path) -> dict[str, ShardIndex]:
    """Return the entries of `index.json` by the name of the shard, without shards that changed since it was written."""
    return {name: index for name, index in (folder_entries(folder) or {}).items() if index is not None}


def folder_entries(folder: Path) -> dict[str, ShardIndex | None] | None:
    """Return the entries of `describe_folder`, and None for a shard with a wrong entry; None if there is no index."""
    found = parse_folder_index(_read(folder / NAME), folder / NAME)
    if found is None:
        return None
    entries: dict[str, ShardIndex | None] = {}
    written = (folder / NAME).stat().st_mtime_ns
    for name, status in _statuses(folder, found).items():
        if (content := found[name]) is None:
            entries[name] = None
            continue
        index = index_from(content, folder / name)
        if index.bytes == status.st_size and status.st_mtime_ns <= written:
            entries[name] = replace(index, mtime_ns=status.st_mtime_ns)
    return entries


def count_folder(folder: Path) -> dict[str, ShardIndex]:
    """Return indexes from the files of timm or open_clip, by name, without shards that changed since."""
    counts: dict[str, ShardIndex] = {}
    for file in COUNT_NAMES:
        if samples := parse_counts(_read(folder / file)):
            written = (folder / file).stat().st_mtime_ns
            for name, status in _statuses(folder, samples).items():
                if can_have(samples[name], status.st_size) and status.st_mtime_ns <= written:
                    index = ShardIndex(folder / name, samples[name], status.st_size, {}, "", True, status.st_mtime_ns)
                    counts.setdefault(name, index)
    return counts


def parse_folder_index(text: bytes, where: object) -> dict[str, dict[str, Any] | None] | None:
    """Parse an `index.json`.

    Args:
        text: Content of the file.
        where: Name of the file, used in warnings.

    Returns:
        The fields of each shard, by its name; None for a shard whose fields cannot be true, with a warning. None
        instead of all if another tool wrote the file.
    """
    if len(text) >= MOST_INDEX:
        _log.warning("%s: is ignored: it has %s or more, which no index has.", where, show_size(MOST_INDEX))
        return None
    if _FORMAT.encode() not in text[:_HEAD]:
        return None
    content = parse_json(text)
    if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (_FORMAT, _VERSION):
        return None
    shards = content.get("shards")
    if not isinstance(shards, dict):
        return None
    flaws = {name: flaw for name, said in shards.items() if (flaw := find_flaw(said))}
    if flaws:
        name, flaw = next(iter(flaws.items()))
        _log.warning(
            "%s: is ignored for %d of its %d shards: of %a it %s. Write it again with `ssmpretrain shards index`.",
            where,
            len(flaws),
            len(shards),
            name[:100],
            flaw,
        )
    return {name: None if name in flaws else said for name, said in shards.items()}


def parse_counts(text: bytes) -> dict[str, int]:
    """Return the number of samples of each shard from an `_info.json` (timm) or `sizes.json` (open_clip).

    The result is empty if the text has another form, or if this package wrote the file.
    """
    with suppress(KeyError, TypeError, AttributeError, ValueError):
        content = parse_json(text)
        if is_ours(content):  # it repeats `index.json`, and is not trusted without it
            return {}
        pairs = [pair for split in content.get("splits", {}).values() for pair in _timm_pairs(split)]
        pairs += [(name, count) for name, count in content.items() if name.endswith(".tar")]
        return {name: count for name, count in pairs if isinstance(name, str) and is_count(count, 1 << 62)}
    return {}


def can_have(samples: int, size: int) -> bool:
    """Return whether a shard of `size` bytes can have `samples` samples: at least one, with one block for each."""
    return 0 < samples <= size // BLOCK


def _timm_pairs(split: dict[str, Any]) -> list[tuple[str, int]]:
    return list(zip(split["filenames"], split["shard_lengths"], strict=True))


def _statuses(folder: Path, wanted: dict[str, Any]) -> dict[str, os.stat_result]:
    found = {}
    for item in os.scandir(folder):
        with suppress(OSError):  # reading the shard later gives the error
            if item.name in wanted:
                found[item.name] = item.stat()
    return found


def _read(path: Path) -> bytes:
    """Read a file of the folder; return nothing if it does not exist, or, with a warning, if it cannot be read."""
    try:
        return read_within(path, MOST_INDEX)
    except FileNotFoundError:
        return b""
    except OSError as error:
        if may_pass(error):
            raise
        _log.warning("%s: is not read (%s).", path, error.strerror)
        return b""
