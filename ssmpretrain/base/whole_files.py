"""Files that are whole or absent, whatever happens while they are written; nothing is written through a link.

A run folder may come from somebody else, or be left by a run that was killed, so nothing that lies there is trusted.
A new file is written under a name that cannot be foreseen, in the same folder, and renamed when it is whole:

- `replacing`: a file to write to; `replace_text`, `replace_json`: all of the content at once.
- `moved_into_place`: a name, for a folder or for a library that wants the path of a file.
- `append`: whole lines at the end of a file.
- `sha256_of`: the checksum of an open file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ssmpretrain.base.errors import UserError

_log = logging.getLogger(__name__)
PARTIAL = ".{}.partial"
_DAMAGED = ".damaged"
_GUARDED = os.O_NOFOLLOW | os.O_CLOEXEC


def partial(path: Path) -> Path:
    """Return the hidden name of a file or folder that several processes write together; in the same file system."""
    return path.with_name(PARTIAL.format(path.name))


def _unforeseeable(path: Path) -> Path:
    """Return a hidden name beside `path` at which nobody can have put anything."""
    return partial(path.with_name(f"{path.name}.{secrets.token_hex(4)}"))


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems cannot; the file itself is safe
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that takes the place of `path` at the end of the block, synced.

    A link at `path` is replaced, and a folder is moved aside. After an error nothing has changed.

    Raises:
        OSError: If the file cannot be written; its `filename` is `path`.
    """
    waiting = _unforeseeable(path)
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


@contextmanager
def moved_into_place(path: Path) -> Iterator[Path]:
    """Give a free name beside `path` for a file or a folder, which takes that place at the end of the block.

    A file at `path` is replaced. After an error nothing has changed. What is written is not synced.

    Raises:
        OSError: If it cannot be renamed, for example because a folder with files lies at `path`.
    """
    waiting = _unforeseeable(path)
    try:
        yield waiting
        waiting.replace(path)
    finally:
        if waiting.is_dir() and not waiting.is_symlink():
            shutil.rmtree(waiting, ignore_errors=True)
        else:
            waiting.unlink(missing_ok=True)


def sync(file: BinaryIO) -> None:
    """Flush a file, and wait until the disk has it."""
    file.flush()
    os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Write `text` to a file, which holds either the old or the new content at every moment; errors as `replacing`."""
    with replacing(path) as file:
        file.write(text.encode())


def replace_json(path: Path, content: Any, indent: int | None = 1) -> None:
    """Write plain data as JSON to a file, which holds the old or the new content at every moment.

    Args:
        path: The file.
        content: Data that `json` can write.
        indent: Spaces of each level; None writes one line.

    Raises:
        OSError: As `replacing`.
    """
    replace_text(path, json.dumps(content, indent=indent) + "\n")


def append(path: Path, lines: bytes) -> None:
    """Append whole lines to a file, all or none, after ending a line that was left unfinished.

    Anything at `path` that is no regular file is moved aside.

    Raises:
        OSError: If the rows cannot be written; its `filename` is `path`.
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
    """Append in one write, or in several where the disk takes less at once; if one fails, remove the part written.

    Another rank may append at the same time; lines that follow ours stay.
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
    """Open a regular file, or the one that a link points to, for reading.

    Raises:
        OSError: If there is no regular file. A pipe may block and a device may have no end, so both are refused.
    """
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "no regular file")
            yield file


def damaged_path(path: Path) -> Path:
    """Return the file that keeps the damaged lines of a file."""
    return path.with_name(path.name + _DAMAGED)


def move_aside_unless_regular(path: Path) -> None:
    """Rename anything at `path` that is no regular file: a folder, a pipe, or a link, whatever it points to."""
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
    """Add the name of the file to errors of the system in the block; the error of a full disk does not name it."""
    try:
        yield
    except OSError as error:
        if isinstance(error, UserError):  # its message is complete
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def sha256_of(descriptor: int) -> str:
    """Return the SHA-256 of an open file, in hexadecimal; the position of the descriptor does not change."""
    digest, place = hashlib.sha256(), 0
    while block := os.pread(descriptor, 1 << 20, place):
        digest.update(block)
        place += len(block)
    return digest.hexdigest()
