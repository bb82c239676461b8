"""Locations of shards: a local path, or a file on a server that is read from its local copy."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ssmpretrain.datamodules.remote.cache import ShardCache
from ssmpretrain.datamodules.remote.server import RemoteFile


@dataclass(frozen=True)
class RemoteShard:
    """A shard on a server.

    Args:
        file: Its address, and what is known of its size and contents.
        cache: Keeps its local copy.
        samples: Number of samples that an index gives it, or -1.
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


Location = Path | RemoteShard


@contextmanager
def local_path(location: Location) -> Iterator[Path]:
    """Yield a file to read the shard from, fetched if need be; it stays for as long as the context lasts.

    Raises:
        SourceError: If its server does not give it.
    """
    if isinstance(location, Path):
        yield location
    else:
        with location.cache.hold(location.file) as path:
            yield path
