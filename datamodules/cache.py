"""Shards of a server on the local disk: fetched once by whoever needs one first, kept while there is room."""

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssmpretrain.datamodules.byte_sizes import parse_size, show_size
from ssmpretrain.datamodules.cache_folder import cache_folder
from ssmpretrain.datamodules.errors import DataError, SourceError
from ssmpretrain.datamodules.remote import PATIENT, Fault, Patience, RemoteFile, Server, connect, persist
from ssmpretrain.datamodules.shard_index import index_path, walk, write_index

_log = logging.getLogger(__name__)
_MOST = 100 << 30  # bytes, where no limit is given
_FORGIVEN_AFTER = 120.0  # seconds for which a shard that failed is not asked for again in the same run


@dataclass(frozen=True)
class ShardCache:
    """A folder of shards fetched from servers, shared by all processes of a machine.

    Each shard has a lock file. Who reads it holds the lock shared, who fetches or removes it holds it alone; the
    kernel releases the lock of a process that dies. The lock file's time is when the shard was last used.

    Args:
        folder: On a local disk, best; made if needed.
        max_bytes: Most bytes of shards in it. The least recently used leave first, none that is being read.
        options: For the library that speaks to the server (`remote.connect`).
        patience: How long to go on with a server that fails.
        run: Tells the processes of one run, which share what failed, from those of another.
    """

    folder: Path
    max_bytes: int
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    patience: Patience = PATIENT
    run: str = field(default_factory=lambda: uuid.uuid4().hex, compare=False)

    @contextmanager
    def hold(self, file: RemoteFile) -> Iterator[Path]:
        """The local copy of a shard, fetched if it is not there; it stays for as long as the context lasts.

        Raises:
            SourceError: If the server does not give it, or not what was expected; as said before, for two minutes.
            DataError: If the cache cannot be written or is too small.
        """
        entry = self.folder / _entry_name(file)
        while True:
            with _locked(_lock_path(entry), fcntl.LOCK_SH):
                if entry.exists():
                    os.utime(_lock_path(entry))
                    yield entry
                    return
            self._fetch(file, entry)

    def index_file(self, file: RemoteFile) -> Path:
        """Where the index of a shard is, once it was fetched; it stays when the shard leaves."""
        return index_path(self.folder / _entry_name(file))

    def _fetch(self, file: RemoteFile, entry: Path) -> None:
        with _locked(_lock_path(entry), fcntl.LOCK_EX) as lock:
            if entry.exists():  # another process was first
                return
            self._recall_failure(lock)
            try:
                self._transfer(file, entry)
            except SourceError as error:
                failure = {"run": self.run, "time": time.time(), "message": str(error), "cause": error.cause}
                os.pwrite(lock, json.dumps(failure).encode(), 0)
                raise
            except OSError as error:
                raise _disk_error(self.folder, error) from error

    def _recall_failure(self, lock: int) -> None:
        """A shard that this run failed to fetch a moment ago fails at once, not after all attempts again."""
        content = os.pread(lock, 1 << 16, 0)
        os.ftruncate(lock, 0)
        failure = json.loads(content or b"{}")
        if failure.get("run") == self.run and time.time() - failure["time"] < _FORGIVEN_AFTER:
            os.pwrite(lock, content, 0)
            raise SourceError(failure["message"], failure["cause"])

    def _transfer(self, file: RemoteFile, entry: Path) -> None:
        partial = self._reserve(file, entry)
        server = connect(file.url, self.options, self.patience)
        with _Download(partial, file) as download:
            persist(lambda: download.go_on(server), file.url, self.patience, lambda: download.furthest)
            write_index(partial, index_path(entry), sha256=download.sha256)
            os.replace(partial, entry)

    def _reserve(self, file: RemoteFile, entry: Path) -> Path:
        """Make room for a shard, and the file that it will be written to, which may hold the start of it."""
        if file.bytes > self.max_bytes:
            raise DataError(
                f"{file}: has {show_size(file.bytes)}; the cache {self.folder} may hold {show_size(self.max_bytes)}. "
                "Raise cache_limit to the size of a few shards for each worker."
            )
        partial = entry.with_name(f"{entry.name}.{max(file.bytes, 0)}.partial")
        with _locked(self.folder / ".room.lock", fcntl.LOCK_EX):
            self._make_room(max(file.bytes, 0), entry)
            partial.touch()
        return partial

    def _make_room(self, needed: int, entry: Path) -> None:
        shards = [shard for shard in self._contents() if shard.entry != entry]
        excess = sum(shard.bytes for shard in shards) + needed - self.max_bytes
        for shard in sorted(shards, key=lambda shard: shard.last_used):
            if excess <= 0:
                return
            if self._remove(shard):
                excess -= shard.bytes
        if excess > 0:
            _log.warning(
                "the cache %s holds %s more than its limit, all of it in use. Raise cache_limit.",
                self.folder,
                show_size(excess),
            )

    def _contents(self) -> "list[_Cached]":
        """What takes room: whole shards, and those under way by the size that they will have."""
        found: list[_Cached] = []
        for item in os.scandir(self.folder):
            entry, size = Path(item.path), 0
            if item.name.endswith(".partial"):
                name, announced, _ = item.name.rsplit(".", 2)
                entry, size = self.folder / name, int(announced)
            elif item.name.startswith(".") or item.name.endswith((".lock", ".json")):
                continue
            with suppress(FileNotFoundError):  # removed or renamed meanwhile
                last_used = _lock_path(entry).stat().st_mtime
                found.append(_Cached(entry, Path(item.path), max(size, item.stat().st_size), last_used))
        return found

    def _remove(self, shard: "_Cached") -> bool:
        """Remove a shard unless somebody reads or fetches it."""
        with suppress(BlockingIOError), _locked(_lock_path(shard.entry), fcntl.LOCK_EX | fcntl.LOCK_NB):
            shard.path.unlink(missing_ok=True)
            _lock_path(shard.entry).unlink(missing_ok=True)
            return True
        return False


def make_cache(
    where: str, folder: str | None = None, limit: str | None = None, options: Mapping[str, Any] | None = None
) -> ShardCache:
    """The cache that a user's arguments ask for.

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
    except OSError as error:
        raise _disk_error(path, error) from error
    if limit is not None:
        try:
            return ShardCache(path, parse_size(limit), options or {})
        except DataError as error:
            raise DataError(f"{where}: cache_limit: {error}") from error
    cache = ShardCache(path, _MOST, options or {})
    used = sum(shard.bytes for shard in cache._contents())
    return ShardCache(path, min(_MOST, (free + used) // 2), options or {})


@dataclass(frozen=True)
class _Cached:
    """A shard in the cache: its final path, the file that is there, bytes reserved, time of the last use in s."""

    entry: Path
    path: Path
    bytes: int
    last_used: float


class _Download:
    """The local end of a transfer: a file that grows over several attempts, and its checksum."""

    def __init__(self, path: Path, file: RemoteFile) -> None:
        self.file = file
        self.path = path
        self._handle = path.open("r+b")
        self._digest = hashlib.sha256()
        while block := self._handle.read(1 << 20):  # what a process that died has left
            self._digest.update(block)
        self.furthest = self._handle.tell()

    def __enter__(self) -> "_Download":
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.close()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def go_on(self, server: Server) -> None:
        """Fetch what is missing, and check the whole."""
        try:
            if self._handle.tell() != self.file.bytes:
                self._receive(server)
            self._check()
        except Fault as fault:
            if fault.cause in ("changed shards", "damaged shards"):
                self._start_again()
            raise

    def _receive(self, server: Server) -> None:
        for piece in server.read(self.file, self._handle.tell()):
            if not piece:
                self._start_again()
            self._handle.write(piece)
            self._digest.update(piece)
            self.furthest = max(self.furthest, self._handle.tell())

    def _check(self) -> None:
        self._handle.flush()
        received, expected = self._handle.tell(), self.file.bytes
        if received < expected:
            raise Fault("unreachable shards", f"the server sent {received:,} of {expected:,} bytes")
        if received > expected >= 0:
            raise Fault("changed shards", f"the server sent more than the expected {expected:,} bytes", attempts=2)
        try:
            walk(self.path)
        except DataError as error:
            reason = str(error).removeprefix(f"{self.path}: ").removesuffix(" Fetch it again.").rstrip(".")
            raise Fault("damaged shards", reason, attempts=2) from error
        if self.file.sha256 not in ("", self.sha256):
            text = "its checksum is not the one in its index: it was rewritten, or damaged on the way"
            raise Fault("changed shards", text, attempts=2)

    def _start_again(self) -> None:
        self._handle.seek(0)
        self._handle.truncate()
        self._digest = hashlib.sha256()


def _entry_name(file: RemoteFile) -> str:
    """One name for one content: the checksum decides where it is known, else address, size and version."""
    contents = file.sha256 or f"{file.url}\n{file.version}"
    digest = hashlib.sha256(f"{contents}\n{file.bytes}".encode()).hexdigest()[:24]
    name = file.name[-100:].lstrip(".")
    return f"{digest}-{name}" if name.endswith(".tar") else f"{digest}-{name}.tar"


def _lock_path(entry: Path) -> Path:
    return entry.with_name(f"{entry.name}.lock")


@contextmanager
def _locked(path: Path, how: int) -> Iterator[int]:
    """Hold a lock file, made if needed.

    Raises:
        BlockingIOError: If another holds it and `how` says not to wait.
    """
    while True:
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise _disk_error(path.parent, error) from error
        try:
            fcntl.flock(lock, how)
            if _still_there(path, lock):
                yield lock
                return
        finally:
            # said aloud: closing alone would leave the lock with a process forked meanwhile
            fcntl.flock(lock, fcntl.LOCK_UN)
            os.close(lock)


def _still_there(path: Path, lock: int) -> bool:
    """Whether the path is still this file: a shard that is removed takes its lock file along."""
    with suppress(FileNotFoundError):
        return os.stat(path).st_ino == os.fstat(lock).st_ino
    return False


def _disk_error(folder: Path, error: OSError) -> DataError:
    remedy = "Make room, or lower cache_limit" if error.errno == errno.ENOSPC else "Choose another folder"
    return DataError(
        f"the cache of shards {folder} cannot be written ({error.strerror}). {remedy}: the argument cache, or "
        "SSMPRETRAIN_CACHE."
    )
