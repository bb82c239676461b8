"""Connections: the server of a URL."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ssmpretrain.datamodules.files.patience import BRIEF, Patience, persist
from ssmpretrain.datamodules.remote.http_server import HttpServer
from ssmpretrain.datamodules.remote.object_store import ObjectStore
from ssmpretrain.datamodules.remote.server import Server, shown_url

_T = TypeVar("_T")


def connect(url: str, options: Mapping[str, Any], patience: Patience) -> Server:
    """Return the server of a URL.

    Args:
        url: Any file or folder on the server.
        options: Options of the library that reads from the server; see `HttpServer` and `ObjectStore`.
        patience: Time limits.

    Raises:
        DataError: If an option is not known, or the library is not installed.
    """
    if urlsplit(url).scheme in ("http", "https"):
        return HttpServer(options, patience)
    return ObjectStore(url, options, patience)


def ask(url: str, options: Mapping[str, Any], question: Callable[[Server], _T]) -> _T:
    """Ask the server of a URL a question, with few repeated attempts, because a person waits at the start of a run.

    Args:
        url: Any file or folder on the server.
        options: Options of the library that reads from the server.
        question: Asks the server, and returns its answer.

    Raises:
        DataError: As `connect`.
        SourceError: If the server gives no answer.
    """
    return persist(lambda: question(connect(url, options, BRIEF)), shown_url(url), BRIEF)
