"""Base class of servers, and files on servers."""

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
    """A file on a server. Messages show its URL without password and signature.

    Args:
        url: URL of the file.
        bytes: Size in bytes, or -1 if it is not known.
        sha256: Checksum in hexadecimal, or empty if it is not known.
        version: Version of the content on the server, such as an ETag or a generation; empty if it is not known.
    """

    url: str
    bytes: int = -1
    sha256: str = ""
    version: str = ""

    @property
    def name(self) -> str:
        """File name in the URL: `https://host/a/train-000000.tar?token=x` -> `train-000000.tar`."""
        return urlsplit(self.url).path.rpartition("/")[2]

    def __str__(self) -> str:
        return shown_url(self.url)


def shown_url(url: str) -> str:
    """Return a URL for messages, without password and signature."""
    return re.sub(r"(?<=://)[^/@]*@", "", url).partition("?")[0] if is_remote(url) else url


def is_remote(text: str) -> bool:
    """Return whether a text is a URL with a scheme other than `file`."""
    scheme, separator, _ = text.partition("://")
    return bool(separator) and scheme != "file"


class Server(ABC):
    """Base class of servers. All methods raise `Fault` if they fail. An object must not be used in another process."""

    @abstractmethod
    def describe(self, url: str) -> RemoteFile:
        """Return a file with its size and version."""

    @abstractmethod
    def read(self, file: RemoteFile, start: int) -> Iterator[bytes]:
        """Yield the content of a file from byte `start` on, in pieces.

        If the server cannot start there, or holds another version, the first piece is empty and the content begins at
        byte 0.

        Raises:
            Fault: If the transfer fails, or the file on the server has another size.
        """

    @abstractmethod
    def head(self, url: str, count: int) -> bytes:
        """Return the first `count` bytes of a small file, or all its bytes if it has fewer."""

    @abstractmethod
    def list(self, folder: str) -> dict[str, RemoteFile] | None:
        """Return the files of a folder by name, empty if there is no such folder; None if the server cannot list."""


def compare(expected: RemoteFile, found: RemoteFile) -> None:
    """Raise `Fault` if the size of a file differs from the expected one; warn if only its version changed."""
    if expected.bytes >= 0 <= found.bytes != expected.bytes:
        text = f"the server's file has {found.bytes:,} bytes; {expected.bytes:,} are expected"
        raise Fault("changed shards", f"{text}: it was rewritten, or its index is of another file")
    if expected.version and found.version and expected.version != found.version:
        _log.warning("%s: changed on the server since it was indexed or listed; its size is the same.", expected)
