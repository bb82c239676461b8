"""Shared lines: an open file without a name, to which several processes append lines."""

from __future__ import annotations

import fcntl
import os
import tempfile
import weakref
from multiprocessing import context, reduction
from typing import Any


class SharedLines:
    """Lines of text that this process and its workers append and read.

    The file has no name. Cleaning the temporary folder therefore does not remove it, and a killed process leaves
    nothing behind. On Linux the file is in memory. Forked workers inherit the open file, and spawned workers receive
    it. Any other copy, such as one by `copy.deepcopy`, starts empty.
    """

    def __init__(self) -> None:
        self._hold(_nameless_file())

    def _hold(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._read = 0  # number of bytes read so far
        self._torn = False  # whether the last line of this process is incomplete
        self._finalizer = weakref.finalize(self, os.close, descriptor)

    def __getstate__(self) -> dict[str, Any]:
        spawning = context.get_spawning_popen() is not None
        return {"shared": reduction.DupFd(self._descriptor) if spawning else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        shared = state["shared"]
        self._hold(_nameless_file() if shared is None else shared.detach())

    def append(self, line: str) -> None:
        """Append a line in one write if the system accepts that, so that lines of other processes do not mix with it.

        Raises:
            OSError: If there is no space for the line.
        """
        content = b"\n" * self._torn + line.encode() + b"\n"
        self._torn = True
        while content:
            content = content[os.write(self._descriptor, content) :]
        self._torn = False

    def new(self) -> list[str]:
        """Return the lines that any process appended since the last call; an unfinished line comes later."""
        content = b""
        while part := os.pread(self._descriptor, 1 << 20, self._read + len(content)):
            content += part
        whole = content[: content.rfind(b"\n") + 1]
        self._read += len(whole)
        return whole.decode().split("\n")[:-1]


def _nameless_file() -> int:
    """Return the descriptor of an empty file that is open for appending."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("ssmpretrain-lines", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_APPEND)
    return descriptor
