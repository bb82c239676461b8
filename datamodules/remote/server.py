"""Servers: the questions that each kind answers, and the files that they hold."""

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from ssmpretrain.datamodules.files.patience import Fault

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemoteFile:
    """A file on a server; a message shows it without password and signature.

    Args:
        url: Where it is.
        bytes: Its size, or -1 where it is not known.
        sha256: Its checksum in hexadecimal, or empty where it is not known.
        version: The server's name for these contents (an ETag, a generation), or empty.
    """

    url: str
    bytes: int = -1
    sha256: str = ""
    version: str = ""

    @property
    def name(self) -> str:
        """`https://host/a/train-000000.tar?token=x` -> `train-000000.tar`."""
        return urlsplit(self.url).path.rpartition("/")[2]

    def __str__(self) -> str:
        return shown_url(self.url)


def shown_url(url: str) -> str:
    """Return a URL as messages show it: without the password or the signature that it may carry."""
    return re.sub(r"(?<=://)[^/@]*@", "", url).partition("?")[0] if is_remote(url) else url


def is_remote(text: str) -> bool:
    """Return whether a path is a URL of another scheme than `file`."""
    scheme, separator, _ = text.partition("://")
    return bool(separator) and scheme != "file"


class Server(ABC):
    """The questions that every kind of server answers. All raise `Fault`; one process uses an object, no other."""

    @abstractmethod
    def describe(self, url: str) -> RemoteFile:
        """Return size and version of a file."""

    @abstractmethod
    def read(self, file: RemoteFile, start: int) -> Iterator[bytes]:
        """Yield the contents from byte `start` on, in pieces.

        A server that cannot do that, or holds another version, yields an empty piece first and begins at byte 0.
        One that holds a file of another size is a `Fault`.
        """

    @abstractmethod
    def head(self, url: str, count: int) -> bytes:
        """Return the first `count` bytes of a small file, or all of it."""

    @abstractmethod
    def list(self, folder: str) -> dict[str, RemoteFile] | None:
        """Return the files of a folder by name (none if there is no such folder); None where a server cannot tell."""


def compare(expected: RemoteFile, found: RemoteFile) -> None:
    """Raise `Fault` if a file has another size than was planned with; warn if its version alone changed."""
    if expected.bytes >= 0 <= found.bytes != expected.bytes:
        text = f"the server's file has {found.bytes:,} bytes; {expected.bytes:,} are expected"
        raise Fault("changed shards", f"{text}: it was rewritten, or its index is of another file")
    if expected.version and found.version and expected.version != found.version:
        _log.warning("%s: changed on the server since it was indexed or listed; its size is the same.", expected)
