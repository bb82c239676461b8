"""Files on a server: what is known of one, how an attempt to get it fails, and how long to go on trying."""

import logging
import random
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ssmpretrain.base.errors import SourceError
from ssmpretrain.base.shown_names import shown as spelled

_log = logging.getLogger(__name__)
_jitter = random.Random()  # its own: waiting for a server does not move the random state of the run
_T = TypeVar("_T")
_LONGEST = 500  # characters of what happened
_SAID = 3  # failures in a row from which on the user is told of each


@dataclass(frozen=True)
class RemoteFile:
    """A file on a server.

    Args:
        url: Where it is.
        bytes: Its size, or -1 where it is not known.
        sha256: Its checksum in hexadecimal, or empty where it is not known.
        version: What the server calls these contents (an ETag, a generation), or empty.
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
        return shown(self.url)


def shown(url: str) -> str:
    """A URL as messages show it: without the password or the signature that it may carry."""
    return re.sub(r"(?<=://)[^/@]*@", "", url).partition("?")[0] if is_remote(url) else url


def is_remote(text: str) -> bool:
    """Whether a path is a URL of another scheme than `file`."""
    scheme, separator, _ = text.partition("://")
    return bool(separator) and scheme != "file"


@dataclass(frozen=True)
class Patience:
    """How long to go on with a server that fails.

    Args:
        attempts: Failures one after another, none of which brought the file further, before it is given up.
        first_wait: Seconds after the first failure; doubled after each, and shortened at random by up to a half.
        longest_wait: Most seconds between two attempts, also where the server asks for more.
        timeout: Seconds for a connection, and for the next byte.
        window, least_bytes: A transfer of fewer bytes than these in as many seconds is stalled.
    """

    attempts: int = 8
    first_wait: float = 0.5
    longest_wait: float = 30.0
    timeout: float = 20.0
    window: float = 60.0
    least_bytes: int = 4 << 20


PATIENT = Patience()
BRIEF = Patience(attempts=4, first_wait=0.25, timeout=10.0, window=30.0)  # at the start of a run, where a person waits


class Fault(Exception):
    """One attempt failed.

    Args:
        cause: What is counted: "missing shards", "unreachable shards", "stalled shards", "refused shards",
            "damaged shards" or "changed shards".
        text: What happened, without the URL; what a server says in it is spelled and cut.
        attempts: Attempts worth making at this fault; None for as many as patience allows.
        wait: Seconds that the server asks to be left alone for.
    """

    def __init__(self, cause: str, text: str, *, attempts: int | None = None, wait: float = 0.0) -> None:
        super().__init__(spelled(" ".join(text.split()))[:_LONGEST])
        self.cause = cause
        self.attempts = attempts
        self.wait = wait


class Server(ABC):
    """What is asked of every kind of server. All methods raise `Fault`; an object is used in one process only."""

    @abstractmethod
    def describe(self, url: str) -> RemoteFile:
        """Size and version of a file."""

    @abstractmethod
    def read(self, file: RemoteFile, start: int) -> Iterator[bytes]:
        """The contents from byte `start` on, in pieces.

        A server that cannot do that, or holds another version, yields an empty piece first and begins at byte 0.
        One that holds a file of another size is a `Fault`.
        """

    @abstractmethod
    def head(self, url: str, count: int) -> bytes:
        """The first `count` bytes of a small file, or all of it."""

    @abstractmethod
    def list(self, folder: str) -> dict[str, RemoteFile] | None:
        """The files of a folder by name (none if there is no such folder); None where a server cannot tell."""


def compare(expected: RemoteFile, found: RemoteFile) -> None:
    """Say that a file changed on its server: another size cannot be the shard that was planned with."""
    if expected.bytes >= 0 <= found.bytes != expected.bytes:
        text = f"the server's file has {found.bytes:,} bytes; {expected.bytes:,} are expected"
        raise Fault("changed shards", f"{text}: it was rewritten, or its index is of another file", attempts=2)
    if expected.version and found.version and expected.version != found.version:
        _log.warning("%s: changed on the server since it was indexed or listed; its size is the same.", expected)


def connect(url: str, options: Mapping[str, Any], patience: Patience) -> Server:
    """The server of a URL; `options` are for the library that speaks to it."""
    if urlsplit(url).scheme in ("http", "https"):
        from ssmpretrain.datamodules.remote.http_server import HttpServer

        return HttpServer(options, patience)
    from ssmpretrain.datamodules.remote.object_store import ObjectStore

    return ObjectStore(url, options, patience)


def persist(attempt: Callable[[], _T], url: str, patience: Patience, progress: Callable[[], int] = lambda: 0) -> _T:
    """Call until it succeeds, with growing waits between failures.

    Args:
        attempt: Raises `Fault` when it fails.
        url: What is fetched, for messages.
        patience: When to give up.
        progress: Bytes had so far: failures that bring `least_bytes` more each are not counted.

    Raises:
        SourceError: With the URL, the attempts and the last cause.
    """
    failures, total, reached = 0, 0, progress()
    while True:
        try:
            return attempt()
        except Fault as fault:
            total += 1
            if progress() - reached >= patience.least_bytes:
                failures, reached = 0, progress()
            failures += 1
            if failures >= min(patience.attempts, fault.attempts or patience.attempts):
                tried = f" ({total} attempts)" if total > 1 else ""
                raise SourceError(f"{shown(url)}: {fault}{tried}.", fault.cause) from fault
            wait = _wait(failures, fault.wait, patience)
            say = _log.info if failures >= _SAID else _log.debug  # one reset among thousands of shards is no news
            say("%s: %s. Trying again in %.1f s.", shown(url), fault, wait)
        time.sleep(wait)


def _wait(failures: int, asked: float, patience: Patience) -> float:
    wait: float = patience.first_wait * 2.0 ** (failures - 1) * _jitter.uniform(0.5, 1)
    return min(max(wait, asked), patience.longest_wait)
