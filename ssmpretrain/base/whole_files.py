"""Files that are whole or not there, whatever happens while they are written; nothing is written through a link.

A run folder may be a stranger's, or be left by a run that was killed: what lies at a name is not taken on trust.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_log = logging.getLogger(__name__)
PARTIAL = ".{}.partial"
_DAMAGED = ".damaged"
_GUARDED = os.O_NOFOLLOW | os.O_CLOEXEC


def partial(path: Path) -> Path:
    """Where a folder lies while it is written; hidden, and in the same file system."""
    return path.with_name(PARTIAL.format(path.name))


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems cannot, and the file itself is safe
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` at the end of the block, synced; after an error nothing has changed.

    A link at `path` is replaced, and a folder moved aside. The file's name until then cannot be foreseen, so that
    nothing lies there already.

    Raises:
        OSError: If that fails; its `filename` is `path`.
    """
    waiting = partial(path.with_name(f"{path.name}.{secrets.token_hex(4)}"))
    with naming(path):
        if path.is_dir() and not path.is_symlink():
            move_aside_unless_regular(path)
        descriptor = os.open(waiting, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _GUARDED, 0o666)
        try:
            with open(descriptor, "wb") as file:
                yield file
                sync(file)
            waiting.replace(path)
        except BaseException:
            waiting.unlink(missing_ok=True)
            raise


def sync(file: BinaryIO) -> None:
    """Bring what was written to the disk itself."""
    file.flush()
    os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Make `text` the content of a file: at every moment it has the old content or the new; errors as `replacing`."""
    with replacing(path) as file:
        file.write(text.encode())


def append(path: Path, lines: bytes) -> None:
    """Append whole lines to a file, all or none, after ending a line that was left unfinished.

    Whatever is no regular file at `path` is moved aside.

    Raises:
        OSError: If that fails; its `filename` is `path`.
    """
    move_aside_unless_regular(path)
    with naming(path):
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | _GUARDED, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            _write_all(descriptor, b"\n" * torn + lines)
        finally:
            os.close(descriptor)


def _write_all(descriptor: int, content: bytes) -> None:
    """Append in one write, or where the disk takes less at once in several; take back what stands there if one fails.

    A rank that stops at the same time may append too: what comes after ours is left alone.
    """
    written = 0
    try:
        while written < len(content):
            count = os.write(descriptor, content[written:])
            if count == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written += count
    except OSError:
        end = os.lseek(descriptor, 0, os.SEEK_CUR)
        if written and os.fstat(descriptor).st_size == end:
            os.ftruncate(descriptor, end - written)
        raise


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file, or what a link to one means, to read.

    Raises:
        OSError: If there is none: a pipe is not waited for, and a device not read for ever.
    """
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "no regular file")
            yield file


def damaged_path(path: Path) -> Path:
    """Where what is damaged in a file is kept."""
    return path.with_name(path.name + _DAMAGED)


def move_aside_unless_regular(path: Path) -> None:
    """Rename what is no regular file: a link, whatever it points to, a folder, a pipe."""
    try:
        if stat.S_ISREG(path.lstat().st_mode):
            return
    except FileNotFoundError:
        return
    target, number = damaged_path(path), 0
    while os.path.lexists(target):
        number += 1
        target = path.with_name(f"{path.name}{_DAMAGED}.{number}")
    path.rename(target)
    _log.warning("%s: a regular file belongs here; what stood there is now %s", path, target.name)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an error of the system within the block the name of the file; writing to a full disk has none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
