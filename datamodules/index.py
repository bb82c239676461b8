"""What is inside a shard, without reading its images: from the index file beside it, or by walking its tar headers."""

import hashlib
import json
import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ssmpretrain.datamodules.errors import DataError
from ssmpretrain.datamodules.tar_walk import walk_tar

VERSION = 1
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class ShardIndex:
    """The contents of one tar file of samples.

    Args:
        path: The tar file.
        samples: Number of samples: runs of members that share a key.
        bytes: Size of the tar file; of the whole one, where it is truncated and its index says what it was.
        extensions: Members per extension, as {"jpg": 1000, "cls": 1000}.
        sha256: Checksum of the tar file in hexadecimal, or empty when it was not computed.
        indexed: Whether the index file beside the shard says so, rather than a walk over its headers.
        mtime_ns: When the tar file was last changed, or 0 where that is not known.
    """

    path: Path
    samples: int
    bytes: int
    extensions: dict[str, int]
    sha256: str = ""
    indexed: bool = False
    mtime_ns: int = 0

    @property
    def images(self) -> int:
        """Number of members that are images."""
        return sum(self.extensions.get(extension, 0) for extension in IMAGE_EXTENSIONS)


class Layout(NamedTuple):
    """Where the samples of a shard lie, and what is known of each.

    Args:
        offsets: Byte offset of each sample's first tar header, (samples,), int64: where a reader can begin.
        crc32: Checksum of each sample's bytes up to the next sample, (samples,), or None where the index has none.
        repeated: Numbers of the samples whose key an earlier sample of the shard has.
    """

    offsets: NDArray[np.int64]
    crc32: NDArray[np.int64] | None
    repeated: frozenset[int]


def index_path(shard: Path) -> Path:
    """`train-000000.tar` -> `train-000000.index.json`."""
    return shard.with_name(shard.name.removesuffix(".tar") + ".index.json")


def load_index(shard: Path) -> ShardIndex:
    """Describe a shard by its index file if there is one, else by walking its headers (cached in memory).

    Raises:
        DataError: If the shard is not a complete tar file, or the index file does not describe it.
    """
    path = index_path(shard)
    stat = shard.stat()
    if not path.exists():
        return walk(shard)[0]
    content = read_index(path)
    if content["bytes"] != stat.st_size:
        raise DataError(
            f"{shard}: its index {path.name} describes {content['bytes']:,} bytes; the file has {stat.st_size:,}. "
            "It is truncated or was rewritten: fetch it again, or delete the index if the file is right."
        )
    return ShardIndex(
        *(shard, content["samples"], stat.st_size, content["extensions"], content["sha256"]),
        indexed=True,
        mtime_ns=stat.st_mtime_ns,
    )


def load_indexes(shards: Iterable[Path]) -> list[ShardIndex | DataError]:
    """`load_index` of each shard, in order; of a shard that is damaged, the error."""

    def attempt(shard: Path) -> ShardIndex | DataError:
        try:
            return load_index(shard)
        except DataError as error:
            return error

    with ThreadPoolExecutor(16) as pool:  # small files: over a network the wait is the cost, not the work
        return list(pool.map(attempt, shards))


@lru_cache(maxsize=64)
def load_layout(shard: Path, size: int | None = None) -> Layout:
    """Where the samples of a shard lie: by its index, else by a walk over its headers, as far as they are there.

    Args:
        shard: The tar file.
        size: Bytes that the index must speak of, or it is of another file; None takes any index.
    """
    path = index_path(shard)
    try:
        content = read_index(path)
    except (DataError, FileNotFoundError):
        content = {}
    if content and size in (None, content["bytes"]):
        crc32 = content.get("crc32")
        known = isinstance(crc32, list) and len(crc32) == content["samples"]
        return Layout(
            np.asarray(content["offsets"], dtype=np.int64),
            np.asarray(crc32, dtype=np.int64) if known else None,
            frozenset(content.get("repeated", ())),
        )
    walked = walk_tar(shard)
    return Layout(walked.offsets, None, walked.repeated)


def load_offsets(shard: Path) -> NDArray[np.int64]:
    """Byte offset of each sample's first tar header, (samples,), int64: where a reader can begin."""
    return load_layout(shard).offsets


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
        "crc32": _crc32_of_samples(shard, [*offsets.tolist(), index.bytes]),
        "repeated": sorted(walk_tar(shard).repeated),
    }
    path = index_path(shard)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(partial, path)
    load_layout.cache_clear()
    return replace(index, sha256=str(content["sha256"]), indexed=True)


def walk(shard: Path) -> tuple[ShardIndex, NDArray[np.int64]]:
    """Count and locate the samples of a shard by its tar headers alone; remembered while the file does not change.

    Returns:
        What is in it, and the byte offset of each sample's first header, (samples,), int64.

    Raises:
        DataError: If it is not a complete tar file.
    """
    stat, walked = shard.stat(), walk_tar(shard)
    if walked.damage:
        raise DataError(f"{shard}: {walked.damage}")
    index = ShardIndex(shard, len(walked.offsets), stat.st_size, walked.extensions, mtime_ns=stat.st_mtime_ns)
    return index, walked.offsets


def read_index(path: Path) -> dict[str, Any]:
    """The content of an index file.

    Raises:
        DataError: If it is not one.
        FileNotFoundError: If there is none.
    """
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


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _crc32_of_samples(shard: Path, bounds: list[int]) -> list[int]:
    """CRC-32 of the bytes between each two bounds."""
    with shard.open("rb") as file:
        file.seek(bounds[0])
        return [zlib.crc32(file.read(stop - start)) for start, stop in pairwise(bounds)]
