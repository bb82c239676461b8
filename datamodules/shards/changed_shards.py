"""Shards that are replaced while a run reads them: noticed, and not read where other samples lie."""

import logging
import os
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from ssmpretrain.base.errors import DataError, SourceError
from ssmpretrain.datamodules.bad_samples import BadSample
from ssmpretrain.datamodules.files.local_files import patiently
from ssmpretrain.datamodules.shards.reading import retried, unavailable
from ssmpretrain.datamodules.shards.shard_index import checksum, index_path, read_index
from ssmpretrain.datamodules.shards.sources import Shard, close_local
from ssmpretrain.datamodules.shards.tar_walk import walk_tar

_log = logging.getLogger(__name__)


def check_unchanged(shard: Shard, size: int, mtime_ns: int) -> None:
    """Raise if a shard is not the file that the run was planned with.

    One that was only written again, as by copying it, is the same: its checksum is that of the index. Without an index
    a whole tar file of the same size passes for the same, which is said.

    Args:
        shard: The tar file.
        size: What it had in bytes.
        mtime_ns: When it had been changed last; 0 if that is not known.

    Raises:
        BadSample: If it is another, is gone or cannot be read.
    """
    if mtime_ns == 0 or not isinstance(shard, Path):  # copies of shards on servers do not change
        return
    found = retried(shard, os.fstat)
    if found.st_mtime_ns != mtime_ns:
        close_local()  # it may be a file of an earlier run that this process has still open
        found = retried(shard, os.fstat)
    if found.st_mtime_ns == mtime_ns:
        return
    try:
        if patiently(shard, lambda: _is_same(shard, size, found.st_size, found.st_mtime_ns)):
            return
    except SourceError as error:
        raise unavailable(shard, error) from None
    raise BadSample("changed shards", f"it is not the file of {size:,} bytes that it was when the run began")


@lru_cache(maxsize=64)
def _is_same(shard: Path, size: int, size_now: int, mtime_ns: int) -> bool:
    # The time is there for the cache to tell a file from another of the same name.
    if size != size_now:
        return False
    with suppress(DataError, FileNotFoundError):
        expected = read_index(index_path(shard))[0].sha256
        return bool(checksum(shard) == expected)
    whole = not walk_tar(shard).damage
    if whole:
        _log.warning("%s: was written while the run reads it; it has no index to compare it with.", shard)
    return whole
