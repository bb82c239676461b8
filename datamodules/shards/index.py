"""What is inside the shards of a run: from an index of their folder, the index beside each, or a walk over each."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules.files.local_files import patiently
from ssmpretrain.datamodules.files.patience import BRIEF
from ssmpretrain.datamodules.remote.remote_index import load_remote_indexes
from ssmpretrain.datamodules.shards.folder_index import count_folder, describe_folder
from ssmpretrain.datamodules.shards.shard_index import (
    IMAGE_EXTENSIONS,
    Layout,
    ShardIndex,
    index_path,
    read_index,
    walk,
)
from ssmpretrain.datamodules.shards.sources import RemoteShard, Shard, remote_layout
from ssmpretrain.datamodules.shards.tar_walk import first_sample, walk_tar

__all__ = ["IMAGE_EXTENSIONS", "ShardIndex", "load_index", "load_indexes", "load_layout"]


def load_index(shard: Path) -> ShardIndex:
    """Describe a local shard by its index file if there is one, else by walking its headers (cached in memory).

    Raises:
        SourceError: If it is gone or cannot be read.
        DataError: If the shard is not a complete tar file, or the index file does not describe it.
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


def load_indexes(shards: Iterable[Shard]) -> list[ShardIndex | DataError]:
    """Describe shards, in order: by the index of their folder where it has them, else each by itself.

    Of a shard that is damaged there is the error.

    Raises:
        FileNotFoundError: If servers do not have some.
    """
    shards = list(shards)
    paths = [shard for shard in shards if isinstance(shard, Path)]
    remote = [shard for shard in shards if isinstance(shard, RemoteShard)]
    found: dict[Shard, ShardIndex | DataError] = {**_describe(paths), **load_remote_indexes(remote)}
    with ThreadPoolExecutor(16) as pool:  # small files: over a network the wait is the cost, not the work
        rest = [path for path in paths if path not in found]
        found.update(zip(rest, pool.map(_attempt, rest), strict=True))
    return [found[shard] for shard in shards]


def load_layout(shard: Shard, size: int | None = None) -> Layout:
    """Where the samples of a shard lie: by its index, else by a walk over its headers, as far as they are there.

    Args:
        shard: The tar file.
        size: Bytes that the index of a local shard must speak of, or it is of another file; None takes any index.

    Raises:
        SourceError: If it is gone or cannot be read, or its server does not give it, or gives one with other samples
            than were planned with.
    """
    if isinstance(shard, RemoteShard):
        return remote_layout(shard)
    return patiently(shard, lambda: _local_layout(shard, size))


def _local_layout(shard: Path, size: int | None) -> Layout:
    path = index_path(shard)
    with suppress(FileNotFoundError):
        indexed = _read_index(path, path.stat().st_mtime_ns, shard)
        if indexed is not None and size in (None, indexed[0].bytes):
            return indexed[1]
    walked = walk_tar(shard)
    return Layout(walked.offsets, None, walked.repeated)


@lru_cache(maxsize=64)
def _read_index(path: Path, mtime_ns: int, shard: Path) -> tuple[ShardIndex, Layout] | None:
    """The index beside a shard; None if it cannot be believed: it is broken, or passes over the first samples."""
    # The time is there for the cache to tell an index from one written anew.
    with suppress(DataError):
        index, layout = read_index(path)
        first = int(layout.offsets[0]) if index.samples else 0
        if first == 0 or first_sample(shard) == first:
            return index, layout
    return None


def _describe(paths: list[Path]) -> dict[Shard, ShardIndex | DataError]:
    """What the indexes of folders say of local shards; numbers of samples alone serve where a shard has no index."""
    found: dict[Shard, ShardIndex | DataError] = {}
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
