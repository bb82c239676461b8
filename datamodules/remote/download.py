"""Downloads: a file grows over several attempts, and is checked when it is complete."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules.files.patience import Fault
from ssmpretrain.datamodules.remote.server import RemoteFile, Server
from ssmpretrain.datamodules.tar.index import walk


class Download:
    """Context manager for the transfer of one file into a local file, with its checksum.

    If the checksum of the file is known, the transfer continues with the bytes that a dead process left. Otherwise it
    starts again, because nothing could tell whether those bytes are correct.

    Args:
        path: The local file, which exists.
        file: The file on the server, with its size and checksum if they are known.
        make_room: Called with the next size of a file whose final size is unknown. It returns the size for which there
            is space, and may lengthen the file to this size. It raises `DataError` if there is no space.

    Attributes:
        furthest: Largest number of bytes that the local file has had.
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
        """Checksum of the bytes written so far, in hexadecimal."""
        return self._digest.hexdigest()

    def go_on(self, server: Server) -> None:
        """Fetch the missing bytes, check the whole file and sync it to the disk.

        Raises:
            Fault: If the transfer fails, or the file is not the expected one.
        """
        try:
            if self._handle.tell() != self.file.bytes:
                self._receive(server)
            self._check()
        except Fault as fault:
            if fault.cause in ("changed shards", "damaged shards"):
                self._start_again()
            raise
        os.fsync(self._handle.fileno())  # otherwise a power cut may leave a file of zeros

    def _receive(self, server: Server) -> None:
        for piece in server.read(self.file, self._handle.tell()):
            if not piece:
                self._start_again()
            self._expect(self._handle.tell() + len(piece))
            self._handle.write(piece)
            self._digest.update(piece)
            self.furthest = max(self.furthest, self._handle.tell())

    def _expect(self, size: int) -> None:
        """Raise if the file would become longer than expected; make room if its size is not known."""
        if size > self.file.bytes >= 0:
            text = f"the server sent more than the expected {self.file.bytes:,} bytes"
            raise Fault("changed shards", text)
        if self.file.bytes < 0 and size > self._room:
            self._room = self._make_room(size)

    def _check(self) -> None:
        self._handle.flush()
        received, expected = self._handle.tell(), self.file.bytes
        if expected < 0:
            self._handle.truncate()
        if received < expected:
            raise Fault("unreachable shards", f"the server sent {received:,} of {expected:,} bytes")
        if received > expected >= 0:  # bytes that a dead process left
            raise Fault("changed shards", f"it has more than the expected {expected:,} bytes")
        try:
            walk(self.path)
        except DataError as error:
            reason = str(error).removeprefix(f"{self.path}: ").removesuffix(" Fetch it again.").rstrip(".")
            raise Fault("damaged shards", reason) from error
        if self.file.sha256 not in ("", self.sha256):
            text = "its checksum is not the one in its index: it was rewritten, or damaged on the way"
            raise Fault("changed shards", text)

    def _start_again(self) -> None:
        self._handle.seek(0)
        self._handle.truncate()
        self._room = 0
        self._digest = hashlib.sha256()
