"""The cache of shards on the local disk: the first process that needs a shard fetches it, the others read it."""

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssmpretrain.base.byte_sizes import parse_size
from ssmpretrain.base.cache_folder import cache_folder
from ssmpretrain.base.errors import DataError, SourceError
from ssmpretrain.datamodules.files.patience import PATIENT, Patience, persist
from ssmpretrain.datamodules.remote.cache_locks import disk_error, is_still_there, lock_path, locked, remove, status_of
from ssmpretrain.datamodules.remote.connect import connect
from ssmpretrain.datamodules.remote.download import Download
from ssmpretrain.datamodules.remote.room import Crowded, Room, partial_path
from ssmpretrain.datamodules.remote.server import RemoteFile
from ssmpretrain.datamodules.tar.index import (
    ShardIndex,
    checksum_of,
    index_path,
    parse_json,
    recall_index,
    write_index,
)

_log = logging.getLogger(__name__)
_MOST = 100 << 30  # bytes, where no limit is given
_MOST_DROPPED = 3  # damaged copies of a shard, one after another
_ALONE = ".alone.lock"  # held by whoever fetches a shard of unknown size that had no room beside others under way
_TO_BE_CONTINUED = ("unreachable shards", "stalled shards")  # what has arrived until then is right
_WAIT, _MOST_WAITS = 0.02, 50  # seconds before a lock is tried again; how often, where nobody fetches
_FORGIVEN_AFTER = 120.0  # seconds for which a shard that failed is not asked for again in the same run


@dataclass(frozen=True)
class ShardCache:
    """A folder of shards fetched from servers, shared by all processes of a machine.

    Each shard has a lock file. Who reads it holds the lock shared, who fetches or removes it holds it alone; the
    kernel releases the lock of a process that dies. The lock file's time is when the shard was last used. A copy has an
    index with its size and checksum. One that is not as it was fetched is dropped, whoever reads it, together with its
    lock and index: those who have it open keep what they have, and everybody else fetches it anew.

    Args:
        folder: On a local disk, best; made if needed.
        max_bytes: Most bytes of shards in it. The least recently used leave first, none that is being read.
        options: For the library that speaks to the server (`connect`).
        patience: How long to go on with a server that fails.
        run: Tells the processes of one run, which share what failed, from those of another.
    """

    folder: Path
    max_bytes: int
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    patience: Patience = PATIENT
    run: str = field(default_factory=lambda: uuid.uuid4().hex, compare=False)

    @property
    def room(self) -> Room:
        """The disk space that the cache may take."""
        return Room(self.folder, self.max_bytes)

    @contextmanager
    def hold(self, file: RemoteFile) -> Iterator[Path]:
        """Give the path of the local copy, fetched if it is not there; it stays for as long as the context lasts.

        Raises:
            SourceError: If the server does not give it, or gives another file; a run asks again in two minutes.
            DataError: If the cache cannot be written or is too small.
        """
        entry, dropped, waited = self.folder / _entry_name(file), 0, 0
        while dropped < _MOST_DROPPED:
            with locked(lock_path(entry), fcntl.LOCK_SH) as lock:
                status = status_of(entry)
                flaw = self._find_flaw(entry, status.st_size, file) if status is not None else ""
                if status is not None and not flaw:
                    with suppress(OSError):  # a lock of another user, who lets us write and not touch it
                        os.utime(lock_path(entry))
                    yield entry
                    return
                if status is not None:
                    self._drop(entry, status.st_ino, flaw, file)
                    dropped += 1
                elif waited > _MOST_WAITS:  # whoever has the lock too reads a copy that somebody removed
                    self._leave_lock(entry, lock)
            if status is None:
                waited += not self._fetch(file, entry)
        raise SourceError(
            f"{file}: its copy {entry} is damaged as soon as it is written. Check the disk, or choose another cache.",
            "damaged shards",
        )

    def renew(self, file: RemoteFile, held: int) -> bool:
        """Drop the copy that a file descriptor has open if its bytes are not those that were fetched.

        Returns:
            Whether it was dropped, and another is to be opened.
        """
        entry = self.folder / _entry_name(file)
        with suppress(DataError, OSError):
            if checksum_of(held) == recall_index(index_path(entry))[0].sha256:
                return False
        self._drop(entry, os.fstat(held).st_ino, "is not as it was fetched (by its checksum)", file)
        return True

    def known(self, file: RemoteFile) -> ShardIndex | None:
        """Return the index of a shard that was fetched once: it stays when the shard leaves. None if there is none."""
        with suppress(DataError, OSError):
            return recall_index(index_path(self.folder / _entry_name(file)))[0]
        return None

    def _find_flaw(self, entry: Path, size: int, file: RemoteFile) -> str:
        """Say what is wrong with a copy, by its size and its index; empty if nothing is."""
        try:
            index = recall_index(index_path(entry))[0]
        except DataError as error:
            return f"has an index that {str(error).partition(': ')[2].partition('. ')[0]}"
        except OSError as error:
            return f"has no index that can be read ({error.strerror})"
        if index.bytes != size:
            return f"has {size:,} bytes; {index.bytes:,} were fetched"
        return "" if file.sha256 in ("", index.sha256) else "has the index of another file"

    def _drop(self, entry: Path, inode: int, flaw: str, file: RemoteFile) -> None:
        """Take a damaged copy out of the cache, unless another process has done so."""
        with locked(self.room.lock, fcntl.LOCK_EX):
            if (status := status_of(entry)) is None or status.st_ino != inode:
                return
            for path in (entry, index_path(entry), lock_path(entry)):
                try:
                    remove(path)
                except OSError as error:
                    raise disk_error(path, error) from error
        _log.warning("%s: this copy of %s %s; it is dropped and fetched anew.", entry, file, flaw)

    def _leave_lock(self, entry: Path, lock: int) -> None:
        """Let all who come from now on have another lock file, as this one has readers of a copy that is gone."""
        with locked(self.room.lock, fcntl.LOCK_EX):
            if status_of(entry) is None and is_still_there(lock_path(entry), lock):
                lock_path(entry).unlink()

    def _fetch(self, file: RemoteFile, entry: Path) -> bool:
        """Fetch a shard that is not there. Return False, a moment later, if others have its lock.

        They fetch it, or have fetched it and read it: to wait until nobody reads could last for ever.
        """
        try:
            with locked(lock_path(entry), fcntl.LOCK_EX | fcntl.LOCK_NB) as lock:
                if not entry.exists():
                    self._fetch_alone(file, entry, lock)
                return True
        except BlockingIOError:
            time.sleep(_WAIT)
            return False

    def _fetch_alone(self, file: RemoteFile, entry: Path, lock: int) -> None:
        self._recall_failure(lock)
        try:
            self._transfer(file, entry)
        except SourceError as error:
            failure = {"run": self.run, "time": time.time(), "message": str(error), "cause": error.cause}
            os.pwrite(lock, json.dumps(failure).encode(), 0)
            raise
        except OSError as error:
            raise disk_error(self.folder, error) from error

    def _recall_failure(self, lock: int) -> None:
        """Raise at once for a shard that this run failed to fetch a moment ago, instead of trying it again."""
        content = os.pread(lock, 1 << 16, 0)
        os.ftruncate(lock, 0)
        failure = parse_json(content)
        if not isinstance(failure, dict) or failure.get("run") != self.run:
            return
        with suppress(KeyError, TypeError):
            if time.time() - failure["time"] < _FORGIVEN_AFTER:
                os.pwrite(lock, content, 0)
                raise SourceError(str(failure["message"]), str(failure["cause"]))

    def _transfer(self, file: RemoteFile, entry: Path) -> None:
        """Fetch a shard. One of unknown size may find no room beside others under way; it is fetched anew, alone.

        A process that waits for its turn here has dropped its part, so that nobody waits for it.
        """
        try:
            self._transfer_beside(file, entry, self.room.reserve)
        except Crowded:
            _log.warning(
                "%s: the cache %s has no room for it beside what else is being fetched; it is fetched anew later. "
                "Raise cache_limit.",
                file,
                self.folder,
            )
            with locked(self.folder / _ALONE, fcntl.LOCK_EX):
                self._transfer_beside(file, entry, self.room.reserve_patiently)

    def _transfer_beside(
        self, file: RemoteFile, entry: Path, reserve: Callable[[RemoteFile, int, Path, Path], int]
    ) -> None:
        partial = partial_path(entry, max(file.bytes, 0))
        reserve(file, max(file.bytes, 0), partial, entry)
        server = connect(file.url, self.options, self.patience)
        try:
            with Download(partial, file, lambda size: reserve(file, size, partial, entry)) as download:
                persist(lambda: download.go_on(server), str(file), self.patience, lambda: download.furthest)
                if index_path(entry).is_dir():
                    remove(index_path(entry))
                write_index(partial, index_path(entry), sha256=download.sha256)
                os.replace(partial, entry)
        except BaseException as error:
            interrupted = not isinstance(error, Exception)
            if not (file.sha256 and (interrupted or getattr(error, "cause", "") in _TO_BE_CONTINUED)):
                partial.unlink(missing_ok=True)
            raise


def make_cache(
    where: str, folder: str | None = None, limit: str | None = None, options: Mapping[str, Any] | None = None
) -> ShardCache:
    """Open the cache that a user's arguments ask for.

    Args:
        where: Opens every message.
        folder: None for `$SSMPRETRAIN_CACHE/shards`.
        limit: As "100G"; None for half of what the disk has left for it, at most 100 GiB.
        options: Of the library that speaks to the server.

    Raises:
        DataError: If the folder cannot be written or the limit is not a size.
    """
    path = Path(folder).expanduser() if folder else cache_folder() / "shards"
    try:
        path.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path).free
        with locked(Room(path, 0).lock, fcntl.LOCK_EX):
            pass
    except OSError as error:
        raise disk_error(path, error) from error
    if limit is not None:
        try:
            return ShardCache(path, parse_size(limit), options or {})
        except DataError as error:
            raise DataError(f"{where}: cache_limit: {error}") from error
    return ShardCache(path, min(_MOST, (free + Room(path, 0).used()) // 2), options or {})


def _entry_name(file: RemoteFile) -> str:
    """Name the copy by its contents: by the checksum where it is known, else by address, size and version."""
    contents = file.sha256 or f"{file.url}\n{file.version}"
    digest = hashlib.sha256(f"{contents}\n{file.bytes}".encode()).hexdigest()[:24]
    name = re.sub(r"[^A-Za-z0-9._-]", "_", file.name)[-100:].lstrip(".")
    return f"{digest}-{name}" if name.endswith(".tar") else f"{digest}-{name}.tar"
