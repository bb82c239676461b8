"""The lock of a run folder: one job at a time may train in it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
from datetime import datetime
from pathlib import Path

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.whole_files import move_aside_unless_regular

_log = logging.getLogger(__name__)
_HELD: set[int] = set()  # file descriptors of this process's locks


class RunLock:
    """Hold a lock on `FOLDER/.lock` until `release` or the end of this process.

    The kernel keeps the lock, so it vanishes with a killed job. If the file system does not support locks, a warning is
    logged and no lock is held. Used as a context manager, the object releases the lock at the end of the block.

    Args:
        folder: Folder of the run. It must exist when the lock is taken.
        at_once: Whether to take the lock now; otherwise call `take` later.

    Raises:
        UserError: If another process holds the lock. The message names host and process.
    """

    def __init__(self, folder: Path, at_once: bool = True) -> None:
        self._folder = folder
        self._file: int | None = None
        self._taken = False
        if at_once:
            self.take()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def take(self) -> None:
        """Take the lock if this object does not hold it yet; errors as for the class."""
        if self._taken:
            return
        self._taken, folder = True, self._folder
        try:
            move_aside_unless_regular(folder / ".lock")
            file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            _log.warning("%s: not locked (%s); do not start a second job in it", folder, error.strerror)
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(file, 1000, 0).decode(errors="replace").strip()
            os.close(file)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(
                    f"{folder}: another job is running in this folder ({holder or 'it does not say which'}). Wait for "
                    "it or stop it, or choose another folder with --run_dir."
                ) from None
            _log.warning("%s: the file system has no locks (%s); do not start a second job in it", folder, error)
            return
        self._file = file
        _HELD.add(file)
        _introduce(file)

    def release(self) -> None:
        """Release the lock. A second call has no effect."""
        self._taken = False
        if self._file is not None:
            _HELD.discard(self._file)
            os.close(self._file)
            self._file = None


def _introduce(file: int) -> None:
    """Write host, process and time into the lock file."""
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    with contextlib.suppress(OSError):  # on a full disk the lock holds without this text
        os.ftruncate(file, 0)
        os.pwrite(file, f"host {socket.gethostname()}, process {os.getpid()}, since {since}\n".encode(), 0)


def _forget() -> None:
    """Close the parent's locks in a forked child, because a worker may outlive its killed parent."""
    for file in _HELD:
        os.close(file)
    _HELD.clear()


os.register_at_fork(after_in_child=_forget)
