"""Tars that this process has open, and where the samples of each lie; those used last stay open."""

import time
import weakref
from collections import defaultdict, deque
from contextlib import ExitStack, suppress
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from ssmpretrain.base.errors import SourceError
from ssmpretrain.datamodules.files.local_files import open_plain
from ssmpretrain.datamodules.shards.location import Location, RemoteShard, local_path
from ssmpretrain.datamodules.tar.index import Layout, locate_samples

_ATTEMPTS = 3  # to get a copy that is whole
_RECENT = 600.0  # seconds in which a process drops as many copies of a shard, at most
_dropped: defaultdict[RemoteShard, deque[float]] = defaultdict(lambda: deque([-_RECENT] * _ATTEMPTS, _ATTEMPTS))


class OpenTar:
    """A tar that is open: it is read to its end even if it is removed meanwhile.

    Args:
        file: The open file, or the local copy of a shard on a server.
        layout: Where its samples lie.

    Attributes:
        checked: Whether all bytes of a copy are known to be those that were fetched.
    """

    checked = False

    def __init__(self, file: BinaryIO, layout: Layout) -> None:
        self.fileno = file.fileno
        self.layout = layout


def open_tar(location: Location, size: int | None = None) -> OpenTar:
    """Open a tar, unless it is open, and find its samples: by its index, else by a walk over its headers.

    Args:
        location: Where it is; a file on a server is fetched if need be.
        size: Bytes that the index of a local tar must give, else it belongs to another file; None accepts any index.

    Raises:
        SourceError: If its server does not give it, or gives one with other samples than were planned with.
        OSError: If it cannot be opened or read.
    """
    if isinstance(location, Path):
        return _open_local(location, size)
    tar = _open_remote(location)
    if location.samples not in (-1, len(tar.layout.offsets)):
        raise SourceError(
            f"{location}: holds {len(tar.layout.offsets):,} samples; {location.samples:,} are expected. It was "
            "rewritten, or its index is of another file: write the index anew with `ssmpretrain shards index` and "
            "upload it.",
            "changed shards",
        )
    return tar


def close_local() -> None:
    """Forget all local tars; `open_tar` opens them anew."""
    _open_local.cache_clear()


def renew(shard: RemoteShard) -> bool:
    """Look at every byte of the local copy, after a sample of it was damaged; drop it if it is not as it was fetched.

    Returns:
        Whether it was dropped: then reading again reads what is fetched anew.

    Raises:
        SourceError: If there is no copy, and its server does not give it.
    """
    held = _open_remote(shard)
    if time.monotonic() - _dropped[shard][0] < _RECENT:  # a disk that damages whatever is written to it
        return False
    if held.checked or not shard.cache.renew(shard.file, held.fileno()):
        held.checked = True  # its samples are damaged on the server
        return False
    _dropped[shard].append(time.monotonic())
    _open_remote.cache_clear()
    return True


@lru_cache(maxsize=64)
def _open_local(path: Path, size: int | None) -> OpenTar:
    return _open(path, size)


@lru_cache(maxsize=4)  # the cache keeps room for those, in each process
def _open_remote(shard: RemoteShard) -> OpenTar:
    for _ in range(_ATTEMPTS):
        with suppress(FileNotFoundError):  # another process has just dropped the copy, as it is damaged
            return _open(shard)
    return _open(shard)


def _open(location: Location, size: int | None = None) -> OpenTar:
    with ExitStack() as stack:
        path = stack.enter_context(local_path(location))
        file = stack.enter_context(open_plain(path))
        tar = OpenTar(file, locate_samples(path, size))
        weakref.finalize(tar, stack.pop_all().close)
        return tar
