"""One transfer from a server: a file that grows over several attempts, and is checked when it is whole."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules.remote.server import Fault, RemoteFile, Server
from ssmpretrain.datamodules.shards.shard_index import walk


class Download:
    """The local end of a transfer, and its checksum; a context manager.

    What a process that died has left is gone on with where the checksum of the whole is known, and only there: else
    nobody could tell whether it is right.

    Args:
        path: Where it is written.
        file: What is expected.
        make_room: Called with the bytes that a file of unknown size is about to have; returns for how many there is
            room, or raises `DataError` if those are too many. It may lengthen the file to as many.
    """

    def __init__(self, path: Path, file: RemoteFile, make_room: Callable[[int], int]) -> None:
        self.file = file
        self.path = path
        self._make_room = make_room
        self._room = 0
        self._handle = path.open("r+b")
        self._digest = hashlib.sha256()
        if not file.sha256:
            self._handle.truncate()
        while block := self._handle.read(1 << 20):
            self._digest.update(block)
        self.furthest = self._handle.tell()

    def __enter__(self) -> "Download":
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.close()

    @property
    def sha256(self) -> str:
        """Checksum of what has been written."""
        return self._digest.hexdigest()

    def go_on(self, server: Server) -> None:
        """Fetch what is missing, and check the whole; afterwards it is on the disk.

        Raises:
            Fault: If that fails, or it is not what was expected.
        """
        try:
            if self._handle.tell() != self.file.bytes:
                self._receive(server)
            self._check()
        except Fault as fault:
            if fault.cause in ("changed shards", "damaged shards"):
                self._start_again()
            raise
        os.fsync(self._handle.fileno())  # else a power cut may leave its final name with zeros in it

    def _receive(self, server: Server) -> None:
        for piece in server.read(self.file, self._handle.tell()):
            if not piece:
                self._start_again()
            self._expect(self._handle.tell() + len(piece))
            self._handle.write(piece)
            self._digest.update(piece)
            self.furthest = max(self.furthest, self._handle.tell())

    def _expect(self, size: int) -> None:
        """Stop before it is longer than it can be."""
        if size > self.file.bytes >= 0:
            text = f"the server sent more than the expected {self.file.bytes:,} bytes"
            raise Fault("changed shards", text, attempts=2)
        if self.file.bytes < 0 and size > self._room:
            self._room = self._make_room(size)

    def _check(self) -> None:
        self._handle.flush()
        received, expected = self._handle.tell(), self.file.bytes
        if expected < 0:
            self._handle.truncate()
        if received < expected:
            raise Fault("unreachable shards", f"the server sent {received:,} of {expected:,} bytes")
        if received > expected >= 0:  # of a process that died
            raise Fault("changed shards", f"it has more than the expected {expected:,} bytes", attempts=2)
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
        self._room = 0
        self._digest = hashlib.sha256()
