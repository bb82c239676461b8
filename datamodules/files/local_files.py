"""Files on local and network disks: only plain files are opened, and reads have a size limit."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from ssmpretrain.base.byte_sizes import show_size

MOST_INDEX = 64 << 20  # bytes of an index: that of a folder of 300,000 shards, or of a shard of 2,500,000 samples


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
