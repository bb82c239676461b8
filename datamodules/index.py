"""What is inside a shard, without reading its images: from the index file beside it, or by walking its tar headers."""

import hashlib
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssmpretrain.datamodules.errors import DataError
from ssmpretrain.datamodules.reading import base_plus_ext

VERSION = 1
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_SKIPPED = re.compile(r"__[^/]*__($|/)")  # webdataset's own members, which its reader passes over too


@dataclass(frozen=True)
class ShardIndex:
    """The contents of one tar file of samples.

    Args:
        path: The tar file.
        samples: Number of samples: runs of members that share a key.
        bytes: Size of the tar file.
        extensions: Members per extension, as {"jpg": 1000, "cls": 1000}.
        sha256: Checksum of the tar file in hexadecimal, or empty when it was not computed.
        indexed: Whether the index file beside the shard says so, rather than a walk over its headers.
    """

    path: Path
    samples: int
    bytes: int
    extensions: dict[str, int]
    sha256: str = ""
    indexed: bool = False

    @property
    def images(self) -> int:
        """Number of members that are images."""
        return sum(self.extensions.get(extension, 0) for extension in IMAGE_EXTENSIONS)


def index_path(shard: Path) -> Path:
    """`train-000000.tar` -> `train-000000.index.json`."""
    return shard.with_name(shard.name.removesuffix(".tar") + ".index.json")


def load_index(shard: Path) -> ShardIndex:
    """Describe a shard by its index file if there is one, else by walking its headers (cached in memory).

    Raises:
        DataError: If the shard is not a complete tar file, or the index file does not describe it.
    """
    path = index_path(shard)
    size = _size(shard)
    if not path.exists():
        return walk(shard)[0]
    content = _read_json(path)
    if content["bytes"] != size:
        raise DataError(
            f"{shard}: its index {path.name} describes {content['bytes']:,} bytes; the file has {size:,}. "
            "It is truncated or was rewritten: fetch it again, or delete the index if the file is right."
        )
    return ShardIndex(shard, content["samples"], size, content["extensions"], content["sha256"], indexed=True)


def load_indexes(shards: Iterable[Path]) -> list[ShardIndex]:
    """`load_index` of each shard, in order.

    Raises:
        DataError: If any shard is damaged: one message with the number of damaged shards and the first of them.
    """

    def attempt(shard: Path) -> ShardIndex | DataError:
        try:
            return load_index(shard)
        except DataError as error:
            return error

    with ThreadPoolExecutor(16) as pool:  # small files: over a network the wait is the cost, not the work
        results = list(pool.map(attempt, shards))
    damaged = [result for result in results if isinstance(result, DataError)]
    if damaged:
        others = (
            f" ({len(damaged) - 1:,} more of the {len(results):,} shards are damaged too.)" if len(damaged) > 1 else ""
        )
        raise DataError(f"{damaged[0]}{others}")
    return [result for result in results if isinstance(result, ShardIndex)]


@lru_cache(maxsize=64)
def load_offsets(shard: Path) -> NDArray[np.int64]:
    """Byte offset of each sample's first tar header, (samples,), int64: where a reader can begin."""
    path = index_path(shard)
    if path.exists():
        return np.asarray(_read_json(path)["offsets"], dtype=np.int64)
    return walk(shard)[1]


def write_index(shard: Path) -> ShardIndex:
    """Walk a shard, checksum it, and write the index file beside it (complete or not at all)."""
    index, offsets = walk(shard)
    content = {
        "version": VERSION,
        "samples": index.samples,
        "bytes": index.bytes,
        "sha256": checksum(shard),
        "extensions": index.extensions,
        "offsets": offsets.tolist(),
    }
    path = index_path(shard)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(partial, path)
    load_offsets.cache_clear()
    return ShardIndex(shard, index.samples, index.bytes, index.extensions, str(content["sha256"]), indexed=True)


def walk(shard: Path) -> tuple[ShardIndex, NDArray[np.int64]]:
    """Count and locate the samples of a shard by its tar headers alone; remembered while the file does not change.

    Returns:
        What is in it, and the byte offset of each sample's first header, (samples,), int64.

    Raises:
        DataError: If it is not a complete tar file.
    """
    return _walk(shard, _size(shard), shard.stat().st_mtime_ns)


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _size(shard: Path) -> int:
    size = shard.stat().st_size
    if size == 0:
        raise DataError(f"{shard}: the file is empty (0 bytes). Fetch it again.")
    return size


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = content["version"] == VERSION and isinstance(content["offsets"], list)
        known = known and all(isinstance(content[name], int) for name in ("samples", "bytes"))
        known = known and isinstance(content["extensions"], dict) and isinstance(content["sha256"], str)
        if known and len(content["offsets"]) == content["samples"]:
            return dict(content)
    except (ValueError, KeyError, TypeError):
        pass
    raise DataError(
        f"{path}: is not an index of version {VERSION}. Delete it, or write it anew with `ssmpretrain shards index`."
    )


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
