"""One file that describes all shards of a folder, so that starting a run does not open each: ours, timm's, open_clip's.

`index.json` (ours) has what the index of each shard has, but for the offsets. timm's `_info.json` and open_clip's
`sizes.json` have numbers of samples.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ssmpretrain.datamodules.errors import DataError
from ssmpretrain.datamodules.other_readers import OPEN_CLIP, TIMM, is_ours, write_for_others
from ssmpretrain.datamodules.shard_index import ShardIndex, contents_of, index_from, is_index, write_json

NAME = "index.json"
COUNT_NAMES = (TIMM, OPEN_CLIP)
_FORMAT = "ssmpretrain shards"
_VERSION = 1


def write_folder_indexes(indexes: Iterable[ShardIndex]) -> None:
    """Write `index.json`, and what other readers ask for, into each folder of these shards.

    What is said there of other shards is kept, if they are still as it says.

    Raises:
        DataError: If a folder has an `index.json` of something else.
    """
    folders: defaultdict[Path, dict[str, Any]] = defaultdict(dict)
    for index in indexes:
        assert isinstance(index.path, Path), index.path
        folders[index.path.parent][index.path.name] = contents_of(index)
    for folder, written in folders.items():
        present = {item.name for item in os.scandir(folder)}
        others: dict[str, Any] = {}
        if NAME in present:
            found = parse_folder_index((folder / NAME).read_bytes())
            if found is None:
                raise DataError(
                    f"{folder / NAME}: is not an index of shards, and is not overwritten. Rename it, or give the "
                    "shards a folder of their own."
                )
            trusted = describe_folder(folder)
            others = {name: found[name] for name in trusted if name not in written and name in found}
        content = dict(sorted({**others, **written}.items()))
        write_json(folder / NAME, {"format": _FORMAT, "version": _VERSION, "shards": content})
        write_for_others(folder, {name: index["samples"] for name, index in content.items()})


def describe_folder(folder: Path) -> dict[str, ShardIndex]:
    """What the folder's index says of the shards in it: by name, without those that changed since it was written."""
    try:
        found = parse_folder_index((folder / NAME).read_bytes())
        written = (folder / NAME).stat().st_mtime_ns
    except OSError:
        return {}
    described = {}
    for name, status in _statuses(folder, found or {}).items():
        index = index_from((found or {})[name], folder / name)
        if index.bytes == status.st_size and status.st_mtime_ns <= written:
            described[name] = replace(index, mtime_ns=status.st_mtime_ns)
    return described


def count_folder(folder: Path) -> dict[str, ShardIndex]:
    """What timm's or open_clip's file says of the shards in a folder, without those that changed since."""
    counts: dict[str, ShardIndex] = {}
    for file in COUNT_NAMES:
        with suppress(OSError):
            written = (folder / file).stat().st_mtime_ns
            samples = parse_counts((folder / file).read_bytes())
            for name, status in _statuses(folder, samples).items():
                if status.st_size and status.st_mtime_ns <= written:
                    index = ShardIndex(folder / name, samples[name], status.st_size, {}, "", True, status.st_mtime_ns)
                    counts.setdefault(name, index)
    return counts


def parse_folder_index(text: bytes) -> dict[str, Any] | None:
    """The shards of an `index.json` by name; None if it is not one of ours (other tools write files of this name)."""
    with suppress(ValueError):
        content = json.loads(text)
        if isinstance(content, dict) and (content.get("format"), content.get("version")) == (_FORMAT, _VERSION):
            shards = content.get("shards")
            return shards if isinstance(shards, dict) and all(map(is_index, shards.values())) else None
    return None


def parse_counts(text: bytes) -> dict[str, int]:
    """Samples by shard, from `_info.json` (splits with filenames and shard_lengths) or `sizes.json`; else nothing."""
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        content = json.loads(text)
        if is_ours(content):  # without the index that it repeats nothing is known of the shards
            return {}
        pairs = [pair for split in content.get("splits", {}).values() for pair in _timm_pairs(split)]
        pairs += [(name, count) for name, count in content.items() if str(name).endswith(".tar")]
        return {str(name): count for name, count in pairs if isinstance(count, int) and count >= 0}
    return {}


def _timm_pairs(split: dict[str, Any]) -> list[tuple[str, int]]:
    return list(zip(split["filenames"], split["shard_lengths"], strict=True))


def _statuses(folder: Path, wanted: dict[str, Any]) -> dict[str, os.stat_result]:
    return {item.name: item.stat() for item in os.scandir(folder) if item.name in wanted}
