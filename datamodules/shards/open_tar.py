"""Open tars of this process, with the places of their samples; the tars used last stay open."""

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

_ATTEMPTS = 3  # attempts to get a copy that is whole
_RECENT = 600.0  # a process drops at most 3 copies of a shard in this number of seconds
_dropped: defaultdict[RemoteShard, deque[float]] = defaultdict(lambda: deque([-_RECENT] * _ATTEMPTS, _ATTEMPTS))


class OpenTar:
    """An open tar. It can be read even after the file was removed.

    Args:
        file: The open file; for a shard on a server, its local copy.
        layout: Places of the samples.

    Attributes:
        checked: Whether all bytes of a local copy were compared with the fetched bytes.
    """

    checked = False

    def __init__(self, file: BinaryIO, layout: Layout) -> None:
        self.fileno = file.fileno
        self.layout = layout


def open_tar(location: Location, size: int | None = None) -> OpenTar:
    """Open a tar and locate its samples, by its index or by a walk over its headers. A tar that is open is reused.

    Args:
        location: Place of the tar; a file on a server is fetched if necessary.
        size: Size in bytes that the index of a local tar must give; an index with another size belongs to another
            file. None accepts any index.

    Raises:
        SourceError: If the server does not deliver the tar, or its number of samples is not the planned one.
        OSError: If the tar cannot be opened or read.
    """
    if isinstance(location, Path):
        return _open_local(location, size)
    tar = _open_remote(location)
    if location.samples not in (-1, len(tar.layout.offsets)):
        raise SourceError(
            f"{location}: holds {len(tar.layout.offsets):,} samples; {location.samples:,} are expected. It was "
            "rewritten, or its index is of another file: write the index again with `ssmpretrain shards index` and "
            "upload it.",
            "changed shards",
        )
    return tar


def close_local() -> None:
    """Close all local tars, so that `open_tar` opens them again."""
    _open_local.cache_clear()


def renew(shard: RemoteShard) -> bool:
    """Check every byte of the local copy of a shard, after a damaged sample; drop the copy if its bytes changed.

    Returns:
        Whether the copy was dropped. The next read then fetches the shard again.

    Raises:
        SourceError: If there is no copy, and the server does not deliver the shard.
    """
    held = _open_remote(shard)
    if time.monotonic() - _dropped[shard][0] < _RECENT:  # the disk damages every copy
        return False
    if held.checked or not shard.cache.renew(shard.file, held.fileno()):
        held.checked = True  # the shard on the server is damaged as well
        return False
    _dropped[shard].append(time.monotonic())
    _open_remote.cache_clear()
    return True


@lru_cache(maxsize=64)
def _open_local(path: Path, size: int | None) -> OpenTar:
    return _open(path, size)


@lru_cache(maxsize=4)  # open files take space in the cache, in each process
def _open_remote(shard: RemoteShard) -> OpenTar:
    for _ in range(_ATTEMPTS):
        with suppress(FileNotFoundError):  # another process has just dropped the damaged copy
            return _open(shard)
    return _open(shard)


def _open(location: Location, size: int | None = None) -> OpenTar:
    with ExitStack() as stack:
        path = stack.enter_context(local_path(location))
        file = stack.enter_context(open_plain(path))
        tar = OpenTar(file, locate_samples(path, size))
        weakref.finalize(tar, stack.pop_all().close)
        return tar
