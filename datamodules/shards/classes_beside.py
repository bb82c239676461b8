"""List of classes beside shards, on a local disk or on a server."""

import logging
from functools import lru_cache
from pathlib import Path

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules.labels.classes import CLASSES_FILE, Classes, parse_classes, read_classes
from ssmpretrain.datamodules.remote.server import RemoteFile
from ssmpretrain.datamodules.shards.location import Location, RemoteShard
from ssmpretrain.datamodules.shards.remote_index import read_small

_log = logging.getLogger(__name__)
_MOST_BYTES = 16 << 20


def folder_of(shard: Location) -> str:
    """Return the folder of a shard, as text; a URL loses its query."""
    return str(shard.parent) if isinstance(shard, Path) else str(shard).rpartition("/")[0]


def classes_beside(shard: Location) -> Classes:
    """Read `classes.json` beside a shard.

    Returns:
        The classes, without names if there is no such file, or if it is not a list of classes.

    Raises:
        SourceError: If a server cannot be reached.
    """
    if isinstance(shard, Path):
        path = shard.parent / CLASSES_FILE
        return _local(path, path.stat().st_mtime_ns) if path.is_file() else Classes((), folder_of(shard))
    address, mark, query = shard.file.url.partition("?")
    url = f"{address.rpartition('/')[0]}/{CLASSES_FILE}{mark}{query}"
    return _remote(RemoteShard(RemoteFile(url), shard.cache), folder_of(shard))


@lru_cache(maxsize=64)
def _local(path: Path, mtime_ns: int) -> Classes:
    # The time is part of the cache's key, so that a rewritten list is read again.
    try:
        return read_classes(path)
    except DataError as error:
        return _passed_over(error, str(path.parent))


@lru_cache(maxsize=64)
def _remote(file: RemoteShard, folder: str) -> Classes:
    content = read_small(file, _MOST_BYTES)
    try:
        return parse_classes(content, str(file)) if content else Classes((), folder)
    except DataError as error:
        return _passed_over(error, folder)


def _passed_over(error: DataError, folder: str) -> Classes:
    _log.warning("%s It is ignored, and labels are read as numbers.", error)
    return Classes((), folder)
