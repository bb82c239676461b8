"""Files of the shard cache: locks, opening and removing."""

import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ssmpretrain.base.errors import DataError

_log = logging.getLogger(__name__)


def open_file(path: Path) -> int:
    """Open a file of the cache, made if needed; not through a link. A link or folder in its place is removed."""
    how = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        if path.is_symlink() or path.is_dir():
            _log.warning("%s: is a link or a folder where the cache keeps a file; it is removed.", path)
            remove(path)
        return os.open(path, how, 0o666)
    except FileNotFoundError:  # somebody has cleaned the disk under the run
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, how, 0o666)


def remove(path: Path) -> None:
    """Remove a file, a folder or a link (not its target), if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def status_of(path: Path) -> os.stat_result | None:
    """Return the status of a file; None if nothing is there, or a link that leads to nothing or to itself."""
    try:
        return path.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return None
        raise


def lock_path(entry: Path) -> Path:
    """Return the lock file of a shard."""
    return entry.with_name(f"{entry.name}.lock")


@contextmanager
def locked(path: Path, how: int) -> Iterator[int]:
    """Hold a lock file, made if needed.

    Raises:
        BlockingIOError: If another holds it and `how` says not to wait.
    """
    while True:
        try:
            lock = open_file(path)
        except OSError as error:
            raise disk_error(path.parent, error) from error
        try:
            fcntl.flock(lock, how)
            if is_still_there(path, lock):
                yield lock
                return
        finally:
            # said aloud: closing alone would leave the lock with a process forked meanwhile
            fcntl.flock(lock, fcntl.LOCK_UN)
            os.close(lock)


def is_still_there(path: Path, lock: int) -> bool:
    """Return whether the path is still this file: a shard that is removed takes its lock file along."""
    with suppress(FileNotFoundError):
        return os.stat(path).st_ino == os.fstat(lock).st_ino
    return False


def disk_error(folder: Path, error: OSError) -> DataError:
    """Build the error for a cache that cannot be written."""
    remedy = "Make room, or lower cache_limit" if error.errno == errno.ENOSPC else "Choose another folder"
    return DataError(
        f"the cache of shards {folder} cannot be written ({error.strerror}). {remedy}: the argument cache, or "
        "SSMPRETRAIN_CACHE."
    )
