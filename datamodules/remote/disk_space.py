"""Disk space of the shard cache: room for a new shard, and removal of old shards."""

import fcntl
import logging
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ssmpretrain.base.byte_sizes import show_size
from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules.remote.cache_locks import lock_path, locked, open_file, remove, status_of
from ssmpretrain.datamodules.remote.server import RemoteFile

_log = logging.getLogger(__name__)
_STEP = 16 << 20  # largest number of bytes that a shard of unknown size reserves at a time
_WAIT = 0.02  # seconds between two attempts to reserve room
_PARTIAL = re.compile(r"(.+)\.(\d{1,18})\.partial").fullmatch


class Crowded(Exception):
    """The cache has no room beside other shards that are being fetched."""


@dataclass(frozen=True)
class _Cached:
    """A shard in the cache: its final path, its present file, its reserved bytes, and the time of its last use in s."""

    entry: Path
    path: Path
    bytes: int
    last_used: float


def partial_path(entry: Path, size: int) -> Path:
    """Return the path to which a shard is written before it moves to `entry`; the name holds its size, 0 if unknown."""
    return entry.with_name(f"{entry.name}.{size}.partial")


@dataclass(frozen=True)
class DiskSpace:
    """Disk space of a cache, shared by all processes of a machine.

    Args:
        folder: Folder of the cache.
        max_bytes: Largest total size of the shards in bytes. The least recently used shards are removed first; a shard
            that is being read is not removed.
    """

    folder: Path
    max_bytes: int

    @property
    def lock(self) -> Path:
        """Lock file of a process that makes room or drops a copy."""
        return self.folder / ".room.lock"

    def used(self) -> int:
        """Return the number of bytes of all shards, complete or being fetched."""
        return sum(shard.bytes for shard in self._contents())

    def reserve(self, file: RemoteFile, size: int, partial: Path, entry: Path) -> int:
        """Make room for a shard, and create the file to which it is written.

        Args:
            file: The shard.
            size: Size of the shard in bytes; if it is not known, the number of bytes received so far.
            partial: Path to which the shard is written.
            entry: Final path of the shard.

        Returns:
            Number of bytes for which there is room now. For a shard of unknown size it is larger than `size`, so that
            room is not requested for every piece.

        Raises:
            DataError: If the shard is larger than the limit of the cache.
            Crowded: If the size is not known, and other transfers leave no room.
        """
        if size > self.max_bytes:
            more = " or more" if file.bytes < 0 else ""
            raise DataError(
                f"{file}: has {show_size(size)}{more}; the cache {self.folder} may hold {show_size(self.max_bytes)}. "
                "Raise cache_limit to the size of a few shards for each worker."
            )
        grows = file.bytes < 0
        room = min(size + min(_STEP, self.max_bytes // 16), self.max_bytes) if grows else size
        with locked(self.lock, fcntl.LOCK_EX):
            self._make_room(room, entry, beside_others=not grows)
            handle = open_file(partial)
            try:
                if grows:
                    os.ftruncate(handle, room)  # the length of the file shows the reserved bytes to others
            finally:
                os.close(handle)
        return room

    def reserve_patiently(self, file: RemoteFile, size: int, partial: Path, entry: Path) -> int:
        """Repeat `reserve` until other transfers end or leave enough room."""
        while True:
            try:
                return self.reserve(file, size, partial, entry)
            except Crowded:
                time.sleep(_WAIT)

    def _make_room(self, needed: int, entry: Path, *, beside_others: bool) -> None:
        """Remove shards until `needed` bytes fit. If they do not fit, raise `Crowded` beside transfers, or warn."""
        shards = [shard for shard in self._contents() if shard.entry != entry]
        excess = sum(shard.bytes for shard in shards) + needed - self.max_bytes
        under_way = False
        for shard in sorted(shards, key=lambda shard: shard.last_used):
            if excess <= 0:
                return
            if self._remove(shard):
                excess -= shard.bytes
            else:
                under_way = under_way or shard.path != shard.entry
        if excess > 0 and under_way and not beside_others:
            raise Crowded
        if excess > 0:
            _log.warning(
                "the cache %s holds %s more than its limit, all of it in use. Raise cache_limit.",
                self.folder,
                show_size(excess),
            )

    def _contents(self) -> list[_Cached]:
        """List the shards in the cache: complete ones, and shards being fetched with their reserved bytes."""
        found: list[_Cached] = []
        for item in os.scandir(self.folder):
            entry, size = Path(item.path), 0
            if item.name.startswith(".") or item.name.endswith((".lock", ".json")):
                continue
            if match := _PARTIAL(item.name):
                entry, size = self.folder / match[1], int(match[2])
            with suppress(FileNotFoundError):  # removed or renamed meanwhile
                lock = status_of(lock_path(entry))
                if lock is not None or match:  # other files do not belong to the cache
                    last_used = lock.st_mtime if lock is not None else 0
                    found.append(
                        _Cached(entry, Path(item.path), max(size, item.stat(follow_symlinks=False).st_size), last_used)
                    )
        return found

    def _remove(self, shard: _Cached) -> bool:
        """Remove a shard unless another process reads or fetches it; return whether it was removed."""
        with suppress(BlockingIOError), locked(lock_path(shard.entry), fcntl.LOCK_EX | fcntl.LOCK_NB):
            remove(shard.path)
            lock_path(shard.entry).unlink(missing_ok=True)
            return True
        return False
