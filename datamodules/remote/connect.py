"""Connections: from a URL to the server that answers for it."""

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
        url: Any file or folder of it.
        options: For the library that speaks to it: `HttpServer` or `ObjectStore` says which there are.
        patience: Gives the time limits.

    Raises:
        DataError: If the options are not known, or the library is not installed.
    """
    if urlsplit(url).scheme in ("http", "https"):
        return HttpServer(options, patience)
    return ObjectStore(url, options, patience)


def ask(url: str, options: Mapping[str, Any], question: Callable[[Server], _T]) -> _T:
    """Ask the server of a URL, again if it fails, as long as a person may wait at the start of a run.

    Raises:
        DataError: As `connect` does.
        SourceError: If the server gives no answer.
    """
    return persist(lambda: question(connect(url, options, BRIEF)), shown_url(url), BRIEF)
