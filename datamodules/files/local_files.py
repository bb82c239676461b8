"""Files on local and network disks: only plain files are opened, and reads have a size limit."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from ssmpretrain.base.byte_sizes import show_size

MOST_INDEX = 64 << 20  # bytes of an index file, enough for 300,000 shards or 2,500,000 samples of a shard


class WrongFile(OSError):
    """The file is not a regular file, or is larger than a file of its kind can be."""


def open_plain(path: Path) -> BinaryIO:
    """Open a regular file, or a link to one, for unbuffered reading.

    Raises:
        WrongFile: If the path is a folder, a device or a pipe.
        OSError: If the file cannot be opened.
    """
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # do not wait at a pipe
    if stat.S_ISREG(os.fstat(file).st_mode):
        return os.fdopen(file, "rb", buffering=0)
    os.close(file)
    raise WrongFile(errno.EINVAL, "Not a regular file", str(path))


def read_within(path: Path, most: int) -> bytes:
    """Read a whole file of at most `most` bytes.

    Raises:
        WrongFile: If the path is not a regular file, or the file has more than `most` bytes.
        OSError: If the file cannot be read.
    """
    with open_plain(path) as file:
        pieces, left = [], most
        while piece := file.read(min(left + 1, 1 << 20)):
            pieces.append(piece)
            left -= len(piece)
            if left < 0:
                raise WrongFile(errno.EFBIG, f"has more than {show_size(most)}", str(path))
        return b"".join(pieces)
