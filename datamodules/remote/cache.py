"""Cache of shards on the local disk: the first process that needs a shard fetches it, and all others read the copy."""

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
from ssmpretrain.base.whole_files import sha256_of
from ssmpretrain.datamodules.files.patience import PATIENT, Patience, persist
from ssmpretrain.datamodules.remote.cache_locks import disk_error, is_still_there, lock_path, locked, remove, status_of
from ssmpretrain.datamodules.remote.connect import connect
from ssmpretrain.datamodules.remote.disk_space import Crowded, DiskSpace, partial_path
from ssmpretrain.datamodules.remote.download import Download
from ssmpretrain.datamodules.remote.server import RemoteFile
from ssmpretrain.datamodules.tar.index import (
    ShardIndex,
    index_path,
    parse_json,
    recall_index,
    write_index,
)

_log = logging.getLogger(__name__)
_MOST = 100 << 30  # largest default limit in bytes
_MOST_DROPPED = 3  # damaged copies of a shard in a row, after which it is given up
_ALONE = ".alone.lock"  # held while a shard of unknown size, which had no room beside others, is fetched alone
_TO_BE_CONTINUED = ("unreachable shards", "stalled shards")  # causes after which the received bytes stay valid
_WAIT, _MOST_WAITS = 0.02, 50  # seconds between attempts to get a lock; largest number of attempts if nobody fetches
_FORGIVEN_AFTER = 120.0  # seconds during which a run does not fetch a failed shard again


@dataclass(frozen=True)
class ShardCache:
    """Folder of shards fetched from servers, shared by all processes of a machine.

    Each shard has a lock file. A process that reads the shard holds a shared lock; a process that fetches or removes it
    holds an exclusive lock. The kernel releases the lock of a process that dies. The time of the lock file is the time
    at which the shard was last used.

    Each copy has an index with its size and checksum. A copy that changed after it was fetched is removed with its lock
    and index. Processes that have it open keep their open file; all others fetch the shard again.

    Args:
        folder: Folder of the cache, best on a local disk; it is created if necessary.
        max_bytes: Largest total size of the shards in bytes. The least recently used shards are removed first; a shard
            that is being read is not removed.
        options: Options of the library that reads from the server, see `connect`.
        patience: Limits of the attempts with a server that fails.
        run: Identifier of the run. The processes of one run share the list of failed shards.
    """

    folder: Path
    max_bytes: int
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    patience: Patience = PATIENT
    run: str = field(default_factory=lambda: uuid.uuid4().hex, compare=False)

    @property
    def disk_space(self) -> DiskSpace:
        """Disk space of the cache."""
        return DiskSpace(self.folder, self.max_bytes)

    @contextmanager
    def hold(self, file: RemoteFile) -> Iterator[Path]:
        """Yield the path of the local copy; fetch it if necessary, and keep it until the end of the block.

        Raises:
            SourceError: If the server does not deliver the file, or delivers another file. A run tries the file again
                after two minutes.
            DataError: If the cache cannot be written or is too small.
        """
        entry, dropped, waited = self.folder / _entry_name(file), 0, 0
        while dropped < _MOST_DROPPED:
            with locked(lock_path(entry), fcntl.LOCK_SH) as lock:
                status = status_of(entry)
                flaw = self._find_flaw(entry, status.st_size, file) if status is not None else ""
                if status is not None and not flaw:
                    with suppress(OSError):  # the lock may belong to another user
                        os.utime(lock_path(entry))
                    yield entry
                    return
                if status is not None:
                    self._drop(entry, status.st_ino, flaw, file)
                    dropped += 1
                elif waited > _MOST_WAITS:  # other holders of the lock read a copy that was removed
                    self._leave_lock(entry, lock)
            if status is None:
                waited += not self._fetch(file, entry)
        raise SourceError(
            f"{file}: its copy {entry} is damaged as soon as it is written. Check the disk, or choose another cache.",
            "damaged shards",
        )

    def renew(self, file: RemoteFile, held: int) -> bool:
        """Drop the local copy of a file if its bytes have changed since it was fetched.

        Args:
            file: The file on the server.
            held: Descriptor of the open copy.

        Returns:
            Whether the copy was dropped, so that a new copy must be opened.
        """
        entry = self.folder / _entry_name(file)
        with suppress(DataError, OSError):
            if sha256_of(held) == recall_index(index_path(entry))[0].sha256:
                return False
        self._drop(entry, os.fstat(held).st_ino, "is not as it was fetched (by its checksum)", file)
        return True

    def known(self, file: RemoteFile) -> ShardIndex | None:
        """Return the index of a shard that was fetched before; it stays after the copy is removed. None if unknown."""
        with suppress(DataError, OSError):
            return recall_index(index_path(self.folder / _entry_name(file)))[0]
        return None

    def _find_flaw(self, entry: Path, size: int, file: RemoteFile) -> str:
        """Return a phrase that says what is wrong with the size or the index of a copy; empty if nothing is wrong."""
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
        """Remove a damaged copy from the cache, unless another process has removed it."""
        with locked(self.disk_space.lock, fcntl.LOCK_EX):
            if (status := status_of(entry)) is None or status.st_ino != inode:
                return
            for path in (entry, index_path(entry), lock_path(entry)):
                try:
                    remove(path)
                except OSError as error:
                    raise disk_error(path, error) from error
        _log.warning("%s: this copy of %s %s; it is dropped and fetched again.", entry, file, flaw)

    def _leave_lock(self, entry: Path, lock: int) -> None:
        """Remove a lock file that is held by readers of a removed copy, so that other processes create a new one."""
        with locked(self.disk_space.lock, fcntl.LOCK_EX):
            if status_of(entry) is None and is_still_there(lock_path(entry), lock):
                lock_path(entry).unlink()

    def _fetch(self, file: RemoteFile, entry: Path) -> bool:
        """Fetch a shard that is not in the cache; return False after a short wait if others hold its lock.

        The others fetch the shard, or have fetched it and read it. Waiting for the lock could take for ever.
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
        """Raise at once if this run failed to fetch the shard in the last two minutes."""
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
        """Fetch a shard.

        A shard of unknown size may find no room beside other transfers. It is then fetched again, alone. A process that
        waits for its turn has removed its partial file, so that no other process waits for it.
        """
        try:
            self._transfer_beside(file, entry, self.disk_space.reserve)
        except Crowded:
            _log.warning(
                "%s: the cache %s has no room for it beside the other transfers; it is fetched again later. "
                "Raise cache_limit.",
                file,
                self.folder,
            )
            with locked(self.folder / _ALONE, fcntl.LOCK_EX):
                self._transfer_beside(file, entry, self.disk_space.reserve_patiently)

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
                with locked(self.disk_space.lock, fcntl.LOCK_EX):  # a listing of the folder may miss a file on its way
                    os.replace(partial, entry)
        except BaseException as error:
            interrupted = not isinstance(error, Exception)
            if not (file.sha256 and (interrupted or getattr(error, "cause", "") in _TO_BE_CONTINUED)):
                partial.unlink(missing_ok=True)
            raise


def make_cache(
    where: str, folder: str | None = None, limit: str | None = None, options: Mapping[str, Any] | None = None
) -> ShardCache:
    """Open the cache with the arguments of a user.

    Args:
        where: Name of the class or command, which opens every message.
        folder: Folder of the cache; None for `$SSMPRETRAIN_CACHE/shards`.
        limit: Largest size, as "100G"; None for half of the available space on the disk, at most 100 GiB.
        options: Options of the library that reads from the server.

    Raises:
        DataError: If the folder cannot be written, or the limit is not a size.
    """
    path = Path(folder).expanduser() if folder else cache_folder() / "shards"
    try:
        path.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path).free
        with locked(DiskSpace(path, 0).lock, fcntl.LOCK_EX):
            pass
    except OSError as error:
        raise disk_error(path, error) from error
    if limit is not None:
        try:
            return ShardCache(path, parse_size(limit), options or {})
        except DataError as error:
            raise DataError(f"{where}: cache_limit: {error}") from error
    return ShardCache(path, min(_MOST, (free + DiskSpace(path, 0).used()) // 2), options or {})


def _entry_name(file: RemoteFile) -> str:
    """Return the name of a copy. It depends on the checksum if that is known, otherwise on URL, size and version."""
    contents = file.sha256 or f"{file.url}\n{file.version}"
    digest = hashlib.sha256(f"{contents}\n{file.bytes}".encode()).hexdigest()[:24]
    name = re.sub(r"[^A-Za-z0-9._-]", "_", file.name)[-100:].lstrip(".")
    return f"{digest}-{name}" if name.endswith(".tar") else f"{digest}-{name}.tar"
