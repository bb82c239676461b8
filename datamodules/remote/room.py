"""The disk space of the shard cache: room for a shard, and which shards leave for it."""

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
_STEP = 16 << 20  # bytes of a shard of unknown size for which room is made at a time, at most
_WAIT = 0.02  # seconds before room is asked for again
_PARTIAL = re.compile(r"(.+)\.(\d{1,18})\.partial").fullmatch


class Crowded(Exception):
    """There is no room beside other shards that are being fetched."""


@dataclass(frozen=True)
class _Cached:
    """A shard in the cache: its final path, the file that is there, bytes reserved, time of the last use in s."""

    entry: Path
    path: Path
    bytes: int
    last_used: float


def partial_path(entry: Path, size: int) -> Path:
    """Return where a shard is written that will lie at `entry`; the name says its bytes, 0 if they are not known."""
    return entry.with_name(f"{entry.name}.{size}.partial")


@dataclass(frozen=True)
class Room:
    """The disk space that a cache may take. All processes of a machine share it.

    Args:
        folder: That of the cache.
        max_bytes: Most bytes of shards in it. The least recently used leave first, none that is being read.
    """

    folder: Path
    max_bytes: int

    @property
    def lock(self) -> Path:
        """The lock file, held by whoever makes room or drops a copy."""
        return self.folder / ".room.lock"

    def used(self) -> int:
        """Return the bytes that shards take, whole ones and those under way."""
        return sum(shard.bytes for shard in self._contents())

    def reserve(self, file: RemoteFile, size: int, partial: Path, entry: Path) -> int:
        """Make room for a shard, and create the file that it is written to.

        Args:
            file: The shard.
            size: Its bytes, or the bytes that it has so far where its size is not known.
            partial: Where it is written.
            entry: Where it will be.

        Returns:
            Bytes for which there is room now: a few more than it has so far, as asking takes time.

        Raises:
            DataError: If it is larger than the cache may be.
            Crowded: If its size is not known, and others under way leave no room.
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
                    os.ftruncate(handle, room)  # others see by its size what it has room for
            finally:
                os.close(handle)
        return room

    def reserve_patiently(self, file: RemoteFile, size: int, partial: Path, entry: Path) -> int:
        """Call `reserve` until others under way have ended or made room."""
        while True:
            try:
                return self.reserve(file, size, partial, entry)
            except Crowded:
                time.sleep(_WAIT)

    def _make_room(self, needed: int, entry: Path, *, beside_others: bool) -> None:
        """Remove shards until so many bytes fit; warn, or raise `Crowded` for those under way, if they do not."""
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
        """List the shards that take room: whole ones, and those under way with the bytes that they have reserved."""
        found: list[_Cached] = []
        for item in os.scandir(self.folder):
            entry, size = Path(item.path), 0
            if item.name.startswith(".") or item.name.endswith((".lock", ".json")):
                continue
            if match := _PARTIAL(item.name):
                entry, size = self.folder / match[1], int(match[2])
            with suppress(FileNotFoundError):  # removed or renamed meanwhile
                lock = status_of(lock_path(entry))
                if lock is not None or match:  # else it is not ours
                    last_used = lock.st_mtime if lock is not None else 0
                    found.append(
                        _Cached(entry, Path(item.path), max(size, item.stat(follow_symlinks=False).st_size), last_used)
                    )
        return found

    def _remove(self, shard: _Cached) -> bool:
        """Remove a shard unless somebody reads or fetches it."""
        with suppress(BlockingIOError), locked(lock_path(shard.entry), fcntl.LOCK_EX | fcntl.LOCK_NB):
            remove(shard.path)
            lock_path(shard.entry).unlink(missing_ok=True)
            return True
        return False
