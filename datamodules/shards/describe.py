"""Indexes of the shards of a run: from the index of the folder, the index of each shard, or a walk over its headers."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules.files.patience import BRIEF, patiently
from ssmpretrain.datamodules.shards.folder_index import count_folder, describe_folder
from ssmpretrain.datamodules.shards.location import Location, RemoteShard
from ssmpretrain.datamodules.shards.remote_index import load_remote_indexes
from ssmpretrain.datamodules.tar.index import ShardIndex, index_path, read_index, walk


def load_index(shard: Path) -> ShardIndex:
    """Return the index of a local shard, from its index file if there is one, otherwise by a walk over its headers.

    Raises:
        SourceError: If the shard does not exist or cannot be read.
        DataError: If the shard is not a complete tar file, or its index file describes another file.
    """
    return patiently(shard, lambda: _load_index(shard), BRIEF)


def _load_index(shard: Path) -> ShardIndex:
    path = index_path(shard)
    stat = shard.stat()
    if not path.exists():
        return walk(shard)[0]
    index = read_index(path, shard)[0]
    if index.bytes != stat.st_size:
        raise DataError(
            f"{shard}: its index {path.name} describes {index.bytes:,} bytes; the file has {stat.st_size:,}. "
            "It is truncated or was rewritten: fetch it again, or delete the index if the file is right."
        )
    return replace(index, mtime_ns=stat.st_mtime_ns)


def load_indexes(shards: Iterable[Location]) -> list[ShardIndex | DataError]:
    """Return the index of each shard, in order, or the error for a damaged shard.

    The index of the folder is used if it lists the shard; otherwise each shard is described alone.

    Raises:
        FileNotFoundError: If a server does not have some of the shards.
    """
    shards = list(shards)
    paths = [shard for shard in shards if isinstance(shard, Path)]
    remote = [shard for shard in shards if isinstance(shard, RemoteShard)]
    found: dict[Location, ShardIndex | DataError] = {**_describe(paths), **load_remote_indexes(remote)}
    with ThreadPoolExecutor(16) as pool:  # small files: over a network the wait is the cost, not the work
        rest = [path for path in paths if path not in found]
        found.update(zip(rest, pool.map(_attempt, rest), strict=True))
    return [found[shard] for shard in shards]


def _describe(paths: list[Path]) -> dict[Location, ShardIndex | DataError]:
    """Return the indexes of local shards from files of their folders.

    Files that give only the number of samples are used if a shard has no index of its own.
    """
    found: dict[Location, ShardIndex | DataError] = {}
    for folder in {path.parent for path in paths}:
        described, counted = patiently(folder, partial(_describe_folder, folder), BRIEF)
        for path in (path for path in paths if path.parent == folder):
            if path.name in described:
                found[path] = described[path.name]
            elif path.name in counted and not index_path(path).exists():
                found[path] = counted[path.name]
    return found


def _describe_folder(folder: Path) -> tuple[dict[str, ShardIndex], dict[str, ShardIndex]]:
    return describe_folder(folder), count_folder(folder)


def _attempt(shard: Path) -> ShardIndex | DataError:
    try:
        return load_index(shard)
    except DataError as error:
        return error
