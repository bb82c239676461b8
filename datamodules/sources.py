"""Where a shard is: a local file, or a file on a server that is read from its local copy."""

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from ssmpretrain.datamodules.cache import ShardCache
from ssmpretrain.datamodules.remote import RemoteFile


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


def descriptor(shard: Shard) -> int:
    """The file descriptor of a shard, to read from anywhere in it; valid until the next call in this process.

    Shards stay open, some of those used last, and are read to their end even if they are removed meanwhile.

    Raises:
        SourceError: If its server does not give it.
        OSError: If it cannot be opened.
    """
    return _open_local(shard).fileno() if isinstance(shard, Path) else _open_remote(shard).file.fileno()


def close_local() -> None:
    """Close all local shards; `descriptor` opens them anew."""
    _open_local.cache_clear()


@lru_cache(maxsize=64)
def _open_local(path: Path) -> BinaryIO:
    return path.open("rb", buffering=0)  # closed when it is forgotten


@lru_cache(maxsize=4)  # the cache keeps room for those, in each process
def _open_remote(shard: RemoteShard) -> "_Held":
    return _Held(shard)


class _Held:
    """The local copy of a shard, open and not to be removed until this is forgotten."""

    def __init__(self, shard: RemoteShard) -> None:
        with ExitStack() as stack:
            self.file: BinaryIO = stack.enter_context(stack.enter_context(local_path(shard)).open("rb", buffering=0))
            weakref.finalize(self, stack.pop_all().close)
