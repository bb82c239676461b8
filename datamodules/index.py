"""What is inside the shards of a run: from an index of their folder, the index beside each, or a walk over each."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ssmpretrain.datamodules.errors import DataError, SourceError
from ssmpretrain.datamodules.folder_index import count_folder, describe_folder
from ssmpretrain.datamodules.remote_index import load_remote_indexes
from ssmpretrain.datamodules.shard_index import (
    IMAGE_EXTENSIONS,
    ShardIndex,
    index_path,
    read_index,
    size_of,
    walk,
)
from ssmpretrain.datamodules.sources import RemoteShard, Shard, local_path

__all__ = ["IMAGE_EXTENSIONS", "ShardIndex", "load_index", "load_indexes", "load_offsets"]


def load_index(shard: Path) -> ShardIndex:
    """Describe a local shard by its index file if there is one, else by walking its headers (cached in memory).

    Raises:
        DataError: If the shard is not a complete tar file, or the index file does not describe it.
    """
    path = index_path(shard)
    size = size_of(shard)
    if not path.exists():
        return walk(shard)[0]
    index = read_index(path, shard)[0]
    if index.bytes != size:
        raise DataError(
            f"{shard}: its index {path.name} describes {index.bytes:,} bytes; the file has {size:,}. "
            "It is truncated or was rewritten: fetch it again, or delete the index if the file is right."
        )
    return index


def load_indexes(shards: Iterable[Shard]) -> list[ShardIndex]:
    """Describe shards, in order: by the index of their folder where it has them, else each by itself.

    Raises:
        DataError: If any shard is damaged: one message with the number of damaged shards and the first of them.
        FileNotFoundError: If servers do not have some.
    """
    shards = list(shards)
    paths = [shard for shard in shards if isinstance(shard, Path)]
    remote = [shard for shard in shards if isinstance(shard, RemoteShard)]
    found: dict[Shard, ShardIndex | DataError] = {**_describe(paths), **load_remote_indexes(remote)}
    with ThreadPoolExecutor(16) as pool:  # small files: over a network the wait is the cost, not the work
        rest = [path for path in paths if path not in found]
        found.update(zip(rest, pool.map(_attempt, rest), strict=True))
    results = [found[shard] for shard in shards]
    damaged = [result for result in results if isinstance(result, DataError)]
    if damaged:
        others = (
            f" ({len(damaged) - 1:,} more of the {len(results):,} shards are damaged too.)" if len(damaged) > 1 else ""
        )
        raise DataError(f"{damaged[0]}{others}")
    return [result for result in results if isinstance(result, ShardIndex)]


def load_offsets(shard: Shard) -> NDArray[np.int64]:
    """Byte offset of each sample's first tar header, (samples,), int64: where a reader can begin.

    Raises:
        SourceError: If the shard's server does not give it, or gives one with other samples than were planned with.
    """
    if isinstance(shard, RemoteShard):
        return _remote_offsets(shard)
    path = index_path(shard)
    if path.exists():
        return _read_offsets(path, path.stat().st_mtime_ns)
    return walk(shard)[1]


@lru_cache(maxsize=64)
def _read_offsets(path: Path, mtime_ns: int) -> NDArray[np.int64]:
    # The time is there for the cache to tell an index from one written anew.
    return read_index(path)[1]


@lru_cache(maxsize=64)
def _remote_offsets(shard: RemoteShard) -> NDArray[np.int64]:
    with local_path(shard):
        offsets = read_index(shard.cache.index_file(shard.file))[1]
    if shard.samples not in (-1, len(offsets)):
        raise SourceError(
            f"{shard}: holds {len(offsets):,} samples; {shard.samples:,} are expected. It was rewritten, or its index "
            "is of another file: write the index anew with `ssmpretrain shards index` and upload it.",
            "changed shards",
        )
    return offsets


def _describe(paths: list[Path]) -> dict[Shard, ShardIndex | DataError]:
    """What the indexes of folders say of local shards; numbers of samples alone serve where a shard has no index."""
    found: dict[Shard, ShardIndex | DataError] = {}
    for folder in {path.parent for path in paths}:
        described, counted = describe_folder(folder), count_folder(folder)
        for path in (path for path in paths if path.parent == folder):
            if path.name in described:
                found[path] = described[path.name]
            elif path.name in counted and not index_path(path).exists():
                found[path] = counted[path.name]
    return found


def _attempt(shard: Path) -> ShardIndex | DataError:
    try:
        return load_index(shard)
    except DataError as error:
        return error
