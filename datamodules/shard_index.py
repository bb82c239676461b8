"""What is inside one shard, without reading its images: a walk over its tar headers, and the index file beside it."""

import hashlib
import json
import os
import re
import tarfile
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ssmpretrain.datamodules.errors import DataError
from ssmpretrain.datamodules.secure_webdataset import base_plus_ext

if TYPE_CHECKING:
    from ssmpretrain.datamodules.sources import Shard

VERSION = 1
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_FIELDS = {"samples": int, "bytes": int, "sha256": str, "extensions": dict}
_SKIPPED = re.compile(r"__[^/]*__($|/)")  # webdataset's own members, which its reader passes over too


@dataclass(frozen=True)
class ShardIndex:
    """The contents of one tar file of samples.

    Args:
        path: The tar file, on a local disk or on a server.
        samples: Number of samples: runs of members that share a key.
        bytes: Size of the tar file.
        extensions: Members per extension, as {"jpg": 1000, "cls": 1000}; empty where only `samples` is known.
        sha256: Checksum of the tar file in hexadecimal, or empty when it was not computed.
        indexed: Whether an index file says so, rather than a walk over its headers.
    """

    path: "Shard"
    samples: int
    bytes: int
    extensions: dict[str, int]
    sha256: str = ""
    indexed: bool = False

    @property
    def images(self) -> int:
        """Number of members that are images: one for each sample, where the members are not known."""
        if not self.extensions:
            return self.samples
        return sum(self.extensions.get(extension, 0) for extension in IMAGE_EXTENSIONS)


def index_path(shard: Path) -> Path:
    """`train-000000.tar` -> `train-000000.index.json`."""
    return shard.with_name(shard.name.removesuffix(".tar") + ".index.json")


def write_index(shard: Path, path: Path | None = None, *, sha256: str = "") -> ShardIndex:
    """Walk a shard and write its index file (complete or not at all).

    Args:
        shard: The tar file.
        path: Where the index goes; None for beside the shard.
        sha256: The shard's checksum where it is known already.
    """
    index, offsets = walk(shard)
    index = replace(index, sha256=sha256 or checksum(shard), indexed=True)
    content = {"version": VERSION, **contents_of(index), "offsets": offsets.tolist()}
    path = path or index_path(shard)
    write_json(path, content)
    return index


def read_index(path: Path, shard: "Shard | None" = None) -> tuple[ShardIndex, NDArray[np.int64]]:
    """Read the index file of a shard: what is in it, and the offset of each sample (samples,).

    Raises:
        DataError: If it is not an index file.
    """
    content = _parse(path.read_bytes())
    if content is None or not _has_offsets(content):
        raise DataError(
            f"{path}: is not an index of version {VERSION}. "
            "Delete it, or write it anew with `ssmpretrain shards index`."
        )
    return index_from(content, shard or path), np.asarray(content["offsets"], dtype=np.int64)


def read_index_head(head: bytes, path: "Shard") -> ShardIndex | None:
    """What the first bytes of an index file say, up to the offsets; None if they are not those of one."""
    opening, separator, _ = head.partition(b', "offsets": [')
    content = _parse(opening + b"}") if separator else None
    return index_from(content, path) if content else None


def contents_of(index: ShardIndex) -> dict[str, Any]:
    """An index as files have it, without its path and offsets."""
    return {name: getattr(index, name) for name in _FIELDS}


def index_from(content: dict[str, Any], path: "Shard") -> ShardIndex:
    """The index that `contents_of` gave."""
    return ShardIndex(path, **{name: content[name] for name in _FIELDS}, indexed=True)


def is_index(content: Any) -> bool:
    """Whether it is what `contents_of` gives, at least."""
    return isinstance(content, dict) and all(isinstance(content.get(name), kind) for name, kind in _FIELDS.items())


def write_json(path: Path, content: Any) -> None:
    """Write a file that is complete or not there."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(partial, path)


def walk(shard: Path) -> tuple[ShardIndex, NDArray[np.int64]]:
    """Count and locate the samples of a shard by its tar headers alone; remembered while the file does not change.

    Returns:
        What is in it, and the byte offset of each sample's first header, (samples,), int64.

    Raises:
        DataError: If it is not a complete tar file.
    """
    return _walk(shard, size_of(shard), shard.stat().st_mtime_ns)


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def size_of(shard: Path) -> int:
    """Size of a tar file in bytes; an empty one is a DataError."""
    size = shard.stat().st_size
    if size == 0:
        raise DataError(f"{shard}: the file is empty (0 bytes). Fetch it again.")
    return size


def _has_offsets(content: dict[str, Any]) -> bool:
    offsets = content.get("offsets")
    return isinstance(offsets, list) and len(offsets) == content["samples"]


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        content = json.loads(text)
    except ValueError:
        return None
    return content if is_index(content) and content.get("version") == VERSION else None


@lru_cache(maxsize=200_000)
def _walk(shard: Path, size: int, mtime_ns: int) -> tuple[ShardIndex, NDArray[np.int64]]:
    # Size and time are there for the cache to tell a file from another of the same name.
    offsets: list[int] = []
    extensions: Counter[str] = Counter()
    current: str | None = None
    try:
        with tarfile.open(shard, mode="r:") as tar:
            for member in tar:
                key, extension = base_plus_ext(member.name)
                if member.isreg() and key is not None and not _SKIPPED.match(member.name):
                    extensions[extension.lower()] += 1
                    if key != current:
                        offsets.append(member.offset)
                        current = key
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every member otherwise
            # tarfile takes a damaged header in mid-file for the end; a whole archive ends in a block of zeros
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError("no end-of-archive block")
    except tarfile.TarError as error:
        raise DataError(f"{shard}: {_diagnose(shard, error, len(offsets))}") from error
    return ShardIndex(shard, len(offsets), size, dict(extensions)), np.asarray(offsets, dtype=np.int64)


def _diagnose(shard: Path, error: Exception, samples: int) -> str:
    """Say what the file is, if it is not a complete tar."""
    with shard.open("rb") as file:
        head = file.read(512)
    if head.lstrip()[:1] == b"<":
        title = re.search(rb"<title>\s*(.*?)\s*</title>", head, re.IGNORECASE | re.DOTALL)
        named = f" ({title.group(1).decode(errors='replace')[:60]!r})" if title else ""
        return f"is a web page{named}, not a tar file: the download failed. Fetch it again."
    if head[:2] == b"\x1f\x8b":
        return "is compressed with gzip; shards are plain tar files. Unpack it with `gunzip`."
    if samples:
        return f"is truncated or damaged after sample {samples:,} ({error}). Fetch it again."
    return f"is not a tar file ({error}). Fetch it again, or remove it from the list."
