"""URLs of shards: a file, a folder or a glob on a server is resolved to shards."""

import fnmatch
from urllib.parse import urlsplit

from ssmpretrain.base.errors import DataError, PathMissing, SourceError
from ssmpretrain.datamodules.files.local_files import MOST_INDEX
from ssmpretrain.datamodules.remote.cache import ShardCache
from ssmpretrain.datamodules.remote.connect import ask
from ssmpretrain.datamodules.remote.server import RemoteFile, shown_url
from ssmpretrain.datamodules.shards.folder_index import NAME, parse_folder_index
from ssmpretrain.datamodules.shards.location import RemoteShard

SCHEMES = ("http", "https", "s3", "gs", "gcs", "hf")


def find_remote(url: str, cache: ShardCache, *, where: str) -> list[RemoteShard]:
    """Return the shards that a URL without braces names.

    A URL that ends in .tar or has a query is one shard; `load_indexes` checks later whether it exists. Any other URL is
    a folder or a glob. The server lists the folder; if it cannot list files, `index.json` of the folder does.

    Args:
        url: A file, a folder or a glob.
        cache: Cache for copies of the shards.
        where: Name of the class and argument, which opens every message.

    Raises:
        DataError: If the scheme is unknown, the URL is not valid, or a web server has no list of its files.
        FileNotFoundError: If no file matches.
        SourceError: If the server cannot be reached.
    """
    _check_address(url, where)
    folder, _, pattern = url.rpartition("/")
    magic = any(sign in pattern for sign in "*[")
    if not magic and (pattern.partition("?")[0].endswith(".tar") or "?" in pattern):
        return [RemoteShard(RemoteFile(url), cache)]
    if not magic:
        folder, pattern = url.rstrip("/"), "*.tar"
    names = _list(folder, cache, where)
    chosen = sorted(fnmatch.filter(names, pattern))
    if not chosen:
        tars = sum(name.endswith(".tar") for name in names)
        raise PathMissing(
            f"{where}: 0 files match {shown_url(folder)}/{pattern}; the folder holds {len(names):,} files, "
            f"{tars:,} of them .tar. Correct the address."
        )
    return [RemoteShard(RemoteFile(f"{folder}/{name}"), cache) for name in chosen]


def _list(folder: str, cache: ShardCache, where: str) -> list[str]:
    listed = ask(folder, cache.options, lambda server: server.list(folder))
    if listed is not None:
        return list(listed)
    url = f"{folder}/{NAME}"
    try:
        content = ask(url, cache.options, lambda server: server.head(url, MOST_INDEX))
    except SourceError as error:
        if error.cause != "missing shards":
            raise
        content = b""
    indexed = parse_folder_index(content, shown_url(url))
    if indexed is None:
        raise DataError(
            f"{where}: a web server does not list its files, and {shown_url(folder)} has no {NAME}. Name the shards in "
            "braces, as train-{000000..001023}.tar, or upload what `ssmpretrain shards index` writes."
        )
    if wrong := [name for name in indexed if "/" in name or not name.isprintable()]:
        raise DataError(
            f"{where}: {shown_url(url)} names files of its folder; got {wrong[0][:100]!a}. Name the shards in braces, "
            "as train-{000000..001023}.tar, or upload what `ssmpretrain shards index` writes."
        )
    return list(indexed)


def _check_address(url: str, where: str) -> None:
    """Raise if a URL is not valid: its scheme is unknown, or it has no usable host."""
    try:
        parts = urlsplit(url)
        usable = parts.hostname and (parts.scheme not in ("http", "https") or parts.port != 0)
        reason = "" if usable else "no host"
        reason = reason if url.isprintable() else "control characters"
    except ValueError as error:  # of an IPv6 address or a port
        parts, reason = None, str(error)
    if parts is not None and parts.scheme not in SCHEMES:
        raise DataError(
            f"{where}: shards are read from local paths and {', '.join(SCHEMES)} URLs; got {shown_url(url)!r}. "
            "Copy or mount the shards first."
        )
    if reason:
        raise DataError(
            f"{where}: a URL names a host and a file; got {shown_url(url)!r} ({reason}). Correct the address."
        )
