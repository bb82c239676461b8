"""Files of the shard cache: locks, and opening and removing of files."""

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
    """Open a file of the cache for reading and writing, and return its descriptor.

    The file is created if necessary. A link or folder in its place is removed.
    """
    how = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        if path.is_symlink() or path.is_dir():
            _log.warning("%s: is a link or a folder where the cache keeps a file; it is removed.", path)
            remove(path)
        return os.open(path, how, 0o666)
    except FileNotFoundError:  # somebody removed the folder during the run
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, how, 0o666)


def remove(path: Path) -> None:
    """Remove a file, a folder or a link (not the target of the link); do nothing if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def status_of(path: Path) -> os.stat_result | None:
    """Return the status of a file; None if there is no file, or a broken link."""
    try:
        return path.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return None
        raise


def lock_path(entry: Path) -> Path:
    """Return the path of the lock file of a shard."""
    return entry.with_name(f"{entry.name}.lock")


@contextmanager
def locked(path: Path, how: int) -> Iterator[int]:
    """Hold a lock until the end of the block, and yield the descriptor of the lock file.

    Args:
        path: The lock file; it is created if necessary.
        how: Flags of `fcntl.flock`.

    Raises:
        BlockingIOError: If another process holds the lock, and `how` says not to wait.
        DataError: If the lock file cannot be opened.
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
            # Unlock explicitly: a process that was forked meanwhile would keep the lock of a closed file.
            fcntl.flock(lock, fcntl.LOCK_UN)
            os.close(lock)


def is_still_there(path: Path, lock: int) -> bool:
    """Return whether the path still leads to this open lock file, which is removed together with its shard."""
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
