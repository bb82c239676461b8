"""Files on local and network disks: plain files alone, read within bounds, and again where an error may pass."""

import errno
import os
import stat
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, TypeVar

from ssmpretrain.base.byte_sizes import show_size
from ssmpretrain.base.errors import SourceError
from ssmpretrain.datamodules.files.patience import PATIENT, Fault, Patience, persist

T = TypeVar("T")
MOST_INDEX = 64 << 20  # bytes of an index: that of a folder of 300,000 shards, or of a shard of 2,500,000 samples
_FORGIVEN_AFTER = 120.0  # seconds for which a file that failed to the end is tried once only
_PASSING = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.EINTR,
    errno.EIO,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENOTCONN,
    errno.EREMOTEIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
}
_given_up: dict[str, float] = {}  # when a file failed to the end, by name, in this process


class WrongFile(OSError):
    """The file is a folder, a device or a pipe, which may have no end, or is too large for what it should be."""


def open_plain(path: Path) -> BinaryIO:
    """Open a plain file, or a link to one, for unbuffered reading.

    Raises:
        WrongFile: If it is something else.
        OSError: If it cannot be opened.
    """
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe that nobody writes to is no wait
    if stat.S_ISREG(os.fstat(file).st_mode):
        return os.fdopen(file, "rb", buffering=0)
    os.close(file)
    raise WrongFile(errno.EINVAL, "Not a regular file", str(path))


def read_within(path: Path, most: int) -> bytes:
    """Read a whole file of `most` bytes at most.

    Raises:
        WrongFile: If it is no plain file, or has more than `most` bytes.
        OSError: If it cannot be read.
    """
    with open_plain(path) as file:
        pieces, left = [], most
        while piece := file.read(min(left + 1, 1 << 20)):
            pieces.append(piece)
            left -= len(piece)
            if left < 0:
                raise WrongFile(errno.EFBIG, f"has more than {show_size(most)}", str(path))
        return b"".join(pieces)


def may_pass(error: OSError) -> bool:
    """Return whether the same may succeed a while later, as on a network disk whose server restarts."""
    return error.errno in _PASSING


def patiently(
    path: object, action: Callable[[], T], patience: Patience = PATIENT, between: Callable[[], None] = lambda: None
) -> T:
    """Do something with a file, and again with growing waits, as for files on servers, if an error may pass.

    A file that failed to the end is tried once only for the next two minutes: each of its samples would wait as long.

    Args:
        path: Names the file.
        action: Opens and reads it.
        patience: When to give up.
        between: Called after an error: closes what is open, as a stale handle stays stale.

    Raises:
        SourceError: If it is gone ("missing shards") or cannot be read ("unreadable shards").
    """

    def attempt() -> T:
        try:
            return action()
        except FileNotFoundError:
            raise Fault("missing shards", "no such file") from None
        except OSError as error:
            between()
            attempts = None if may_pass(error) else 1
            raise Fault("unreadable shards", error.strerror or str(error), attempts=attempts) from error

    name = str(path)
    recent = time.monotonic() - _given_up.get(name, -_FORGIVEN_AFTER) < _FORGIVEN_AFTER
    try:
        return persist(attempt, name, replace(patience, attempts=1) if recent else patience)
    except SourceError as error:
        if error.cause == "unreadable shards" and not recent:
            _given_up[name] = time.monotonic()
        raise
