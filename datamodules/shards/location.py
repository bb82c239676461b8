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
        file: Address of the shard, with its size and checksum if they are known.
        cache: Cache that keeps the local copy.
        samples: Number of samples in the index of the shard, or -1 if it is not known.
    """

    file: RemoteFile
    cache: ShardCache
    samples: int = -1

    @property
    def name(self) -> str:
        """File name of the shard, like the name of a path."""
        return self.file.name

    def __str__(self) -> str:
        return str(self.file)


Location = Path | RemoteShard


@contextmanager
def local_path(location: Location) -> Iterator[Path]:
    """Yield the path of a local file with the shard; fetch it if necessary, and keep it until the end of the block.

    Raises:
        SourceError: If the server does not deliver the shard.
    """
    if isinstance(location, Path):
        yield location
    else:
        with location.cache.hold(location.file) as path:
            yield path
