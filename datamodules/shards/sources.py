"""Where a shard is: a local file, or a file on a server that is read from its local copy."""

import time
import weakref
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from ssmpretrain.base.errors import SourceError
from ssmpretrain.datamodules.files.local_files import open_plain
from ssmpretrain.datamodules.remote.cache import ShardCache
from ssmpretrain.datamodules.remote.server import RemoteFile
from ssmpretrain.datamodules.shards.shard_index import Layout


@dataclass(frozen=True)
class RemoteShard:
    """A shard on a server.

    Args:
        file: Address, and what is known of size and contents.
        cache: Where its copy is kept.
        samples: How many it is said to have, or -1.
    """

    file: RemoteFile
    cache: ShardCache
    samples: int = -1

    @property
    def name(self) -> str:
        """Its file name, as that of a path."""
        return self.file.name

    def __str__(self) -> str:
        return str(self.file)


Shard = Path | RemoteShard

_ATTEMPTS = 3  # to get a copy that is whole
_RECENT = 600.0  # seconds in which a process drops as many copies of a shard, at most
_dropped: defaultdict["RemoteShard", deque[float]] = defaultdict(lambda: deque([-_RECENT] * _ATTEMPTS, _ATTEMPTS))


@contextmanager
def local_path(shard: Shard) -> Iterator[Path]:
    """A file to read the shard from, fetched if need be; it stays for as long as the context lasts.

    Raises:
        SourceError: If its server does not give it.
    """
    if isinstance(shard, Path):
        yield shard
    else:
        with shard.cache.hold(shard.file) as path:
            yield path


@contextmanager
def opened(shard: Shard) -> Iterator[int]:
    """The file descriptor of a shard, to read from anywhere in it; valid for as long as the context lasts.

    Shards stay open, some of those used last, and are read to their end even if they are removed meanwhile.

    Raises:
        SourceError: If its server does not give it.
        OSError: If it cannot be opened.
    """
    held = (
        _open_local(shard) if isinstance(shard, Path) else _open_remote(shard)
    )  # another thread may have it forgotten
    yield held.fileno()


def remote_layout(shard: RemoteShard) -> Layout:
    """Where the samples of a shard on a server lie, by the index of its local copy.

    Raises:
        SourceError: If its server does not give it, or gives one with other samples than were planned with.
    """
    layout = _open_remote(shard).layout
    if shard.samples not in (-1, len(layout.offsets)):
        raise SourceError(
            f"{shard}: holds {len(layout.offsets):,} samples; {shard.samples:,} are expected. It was rewritten, or its "
            "index is of another file: write the index anew with `ssmpretrain shards index` and upload it.",
            "changed shards",
        )
    return layout


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


def close_local() -> None:
    """Forget all local shards; `opened` opens them anew."""
    _open_local.cache_clear()


@lru_cache(maxsize=64)
def _open_local(path: Path) -> BinaryIO:
    return open_plain(path)  # closed when it is forgotten


@lru_cache(maxsize=4)  # the cache keeps room for those, in each process
def _open_remote(shard: RemoteShard) -> "_Held":
    for _ in range(_ATTEMPTS):
        with suppress(FileNotFoundError):  # another process has just dropped the copy, as it is damaged
            return _Held(shard)
    return _Held(shard)


class _Held:
    """The local copy of a shard, open and not to be removed until this is forgotten, and where its samples lie."""

    checked = False  # whether all of its bytes are known to be those that were fetched

    def __init__(self, shard: RemoteShard) -> None:
        with ExitStack() as stack:
            path = stack.enter_context(local_path(shard))
            file = stack.enter_context(open_plain(path))
            self.fileno = file.fileno
            self.layout = shard.cache.layout(shard.file)
            weakref.finalize(self, stack.pop_all().close)
