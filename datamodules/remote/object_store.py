"""Files in S3-compatible stores, Google Cloud Storage and Hugging Face data sets, through fsspec."""

import importlib.util
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules.files.patience import Fault, Patience
from ssmpretrain.datamodules.remote.server import RemoteFile, Server, compare

# scheme: (module that fsspec needs, extra of this package that brings it)
_LIBRARIES = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs"), "hf": ("huggingface_hub", "hf")}
_FIRST_PIECE, _LARGEST_PIECE = 4 << 20, 64 << 20
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "RefreshError")
_VERSIONS = ("ETag", "etag", "generation", "blob_id", "LastModified", "mtime", "created")


class ObjectStore(Server):
    """Object store that fsspec can read.

    Args:
        url: Any file in the store; the scheme names the kind of store.
        options: Arguments of fsspec's file system, as {"anon": True, "endpoint_url": "http://..."}.
        patience: Time limits.

    Raises:
        DataError: If the scheme is not known, or its library is not installed or does not accept the options.
    """

    def __init__(self, url: str, options: Mapping[str, Any], patience: Patience) -> None:
        # Otherwise gcsfs uses gRPC to find the kind of a bucket, and gRPC does not survive a fork.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        import fsspec

        scheme = urlsplit(url).scheme
        module, extra = _LIBRARIES.get(scheme, ("", ""))
        if module and importlib.util.find_spec(module) is None:
            raise DataError(f"{scheme}://: needs {module}. Install it with `pip install ssmpretrain[{extra}]`.")
        defaults = _timeouts(patience) if scheme == "s3" else {}
        try:
            # Each process and thread gets a new object from fsspec, because such objects do not survive a fork.
            self.files = fsspec.filesystem(scheme, **{**defaults, **options})
        except (TypeError, ValueError, ImportError) as error:
            raise DataError(f"{scheme}://: cannot be opened ({error}). Check the URL and storage_options.") from error
        self.patience = patience

    def describe(self, url: str) -> RemoteFile:
        path = self._path(url)
        self._forget(path.rpartition("/")[0])
        return _file(url, self._call("info", path))

    def read(self, file: RemoteFile, start: int) -> Iterator[bytes]:
        found = self.describe(file.url)
        compare(file, found)
        if start and file.version and file.version != found.version:
            yield b""
            start = 0
        size = _FIRST_PIECE
        while start < found.bytes:
            began = time.monotonic()
            end = min(start + size, found.bytes)
            piece = self._call("cat_file", self._path(file.url), start=start, end=end)
            if not piece:
                raise Fault("unreachable shards", f"the server sent {start:,} of {found.bytes:,} bytes")
            yield piece
            start += len(piece)
            if time.monotonic() - began < 1:
                size = min(2 * size, _LARGEST_PIECE)

    def head(self, url: str, count: int) -> bytes:
        content: bytes = self._call("cat_file", self._path(url), start=0, end=count)
        return content

    def list(self, folder: str) -> dict[str, RemoteFile]:
        path = self._path(folder)
        self._forget(path)
        try:
            entries = self._call("ls", path, detail=True)
        except Fault as fault:
            if fault.cause == "missing shards" and "bucket" not in str(fault):
                return {}
            raise
        files = (entry for entry in entries if entry["type"] == "file")
        named = ((entry["name"].rpartition("/")[2], entry) for entry in files)
        return {name: _file(f"{folder.rstrip('/')}/{name}", entry) for name, entry in named if name}

    def _path(self, url: str) -> str:
        try:
            return str(self.files._strip_protocol(url))
        except ValueError as error:
            raise _no_address(error) from error

    def _forget(self, path: str) -> None:
        """Clear the cached listing of a folder, so that the library asks the server again."""
        try:
            self.files.invalidate_cache(path)
        except ValueError as error:
            raise _no_address(error) from error

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the file system, for at most `patience.window` seconds if the library can enforce that."""
        try:
            if self.files.async_impl:
                from fsspec.asyn import sync

                function = getattr(self.files, f"_{method}")
                return sync(self.files.loop, function, *args, timeout=self.patience.window, **kwargs)
            return getattr(self.files, method)(*args, **kwargs)
        except Exception as error:  # each library has its own classes of errors
            raise _fault(error) from error


def _timeouts(patience: Patience) -> dict[str, Any]:
    # One attempt only: attempts of botocore would multiply with those of this package.
    limits = {
        "connect_timeout": patience.timeout,
        "read_timeout": patience.timeout,
        "retries": {"total_max_attempts": 1},
    }
    return {"config_kwargs": limits}


def _file(url: str, info: Mapping[str, Any]) -> RemoteFile:
    version = next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
    checksum = (info.get("lfs") or {}).get("sha256") or ""  # Hugging Face knows it of large files
    return RemoteFile(url, int(info["size"] if info["size"] is not None else -1), checksum, version)


def _no_address(error: ValueError) -> Fault:
    return Fault("refused shards", f"its address is not valid ({str(error)[:200]})")


def _fault(error: Exception) -> Fault:
    said = str(error) or type(error).__name__
    if isinstance(error, FileNotFoundError):
        reason = said if "bucket" in said else "there is no such file"
        return Fault("missing shards", reason)
    if type(error).__name__ in _NO_CREDENTIALS:
        return Fault("refused shards", f"no credentials ({said}): set them, or storage_options {{anon: true}}")
    if isinstance(error, PermissionError):
        return Fault("refused shards", f"access is denied ({said}): check credentials and permissions")
    if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
        return Fault("stalled shards", "the server does not answer (timed out)")
    return Fault("unreachable shards", f"the request failed ({said[:200]})")
