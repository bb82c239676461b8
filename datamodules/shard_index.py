"""What is inside one shard, without reading its images: a walk over its tar headers, and the index file beside it."""

import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ssmpretrain.datamodules.errors import DataError
from ssmpretrain.datamodules.tar_walk import walk_tar

if TYPE_CHECKING:
    from ssmpretrain.datamodules.sources import Shard

VERSION = 1
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
LABEL_EXTENSIONS = ("cls", "json")
_FIELDS = {"samples": int, "bytes": int, "sha256": str, "extensions": dict}


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
        mtime_ns: When the tar file was last changed, or 0 where that is not known.
    """

    path: "Shard"
    samples: int
    bytes: int
    extensions: dict[str, int]
    sha256: str = ""
    indexed: bool = False
    mtime_ns: int = 0

    @property
    def images(self) -> int:
        """Number of members that are images: one for each sample, where the members are not known."""
        if not self.extensions:
            return self.samples
        return sum(self.extensions.get(extension, 0) for extension in IMAGE_EXTENSIONS)

    @property
    def may_have_labels(self) -> bool:
        """Whether members can hold labels, as far as is known."""
        return not self.extensions or not self.extensions.keys().isdisjoint(LABEL_EXTENSIONS)


class Layout(NamedTuple):
    """Where the samples of a shard lie, and what is known of each.

    Args:
        offsets: Byte offset of each sample's first tar header, (samples,), int64: where a reader can begin.
        crc32: Checksum of each sample's bytes up to the next sample, (samples,), or None where it is not known.
        repeated: Numbers of the samples whose key an earlier sample of the shard has.
    """

    offsets: NDArray[np.int64]
    crc32: NDArray[np.int64] | None
    repeated: frozenset[int]


def describe_several_images(shards: Iterable[tuple[int, Mapping[str, int]]]) -> str:
    """Say which image is read where samples have several; empty if no shard has more images than samples.

    Args:
        shards: Of each, the number of samples, and that of their members per extension.
    """
    samples, images = 0, Counter[str]()
    for number, extensions in shards:
        held = {name: extensions[name] for name in IMAGE_EXTENSIONS if name in extensions}
        if sum(held.values()) > number:
            samples += number
            images.update(held)
    if not samples:
        return ""
    counts = " and ".join(f"{count:,} {name}" for name, count in images.items())
    order = ", ".join(IMAGE_EXTENSIONS)
    return f"{samples:,} samples hold {counts}: of the images of a sample the first of {order} is read"


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
    content = {
        "version": VERSION,
        **contents_of(index),
        "offsets": offsets.tolist(),
        "crc32": _crc32_of_samples(shard, [*offsets.tolist(), index.bytes]),
        "repeated": sorted(walk_tar(shard).repeated),
    }
    path = path or index_path(shard)
    write_json(path, content)
    return index


def read_index(path: Path, shard: "Shard | None" = None) -> tuple[ShardIndex, Layout]:
    """Read the index file of a shard: what is in it, and where each sample lies.

    Raises:
        DataError: If it is not an index file.
    """
    content = _parse(path.read_bytes())
    if content is None or not _has_offsets(content):
        raise DataError(
            f"{path}: is not an index of version {VERSION}. "
            "Delete it, or write it anew with `ssmpretrain shards index`."
        )
    crc32 = content.get("crc32")
    known = isinstance(crc32, list) and len(crc32) == content["samples"]
    layout = Layout(
        np.asarray(content["offsets"], dtype=np.int64),
        np.asarray(crc32, dtype=np.int64) if known else None,
        frozenset(content.get("repeated", ())),
    )
    return index_from(content, shard or path), layout


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


def write_json(path: Path, content: Any, indent: int | None = None) -> None:
    """Write a file that is complete or not there."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file that is complete or not there."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


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


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _has_offsets(content: dict[str, Any]) -> bool:
    offsets = content.get("offsets")
    return isinstance(offsets, list) and len(offsets) == content["samples"]


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        content = json.loads(text)
    except ValueError:
        return None
    return content if is_index(content) and content.get("version") == VERSION else None


def _crc32_of_samples(shard: Path, bounds: list[int]) -> list[int]:
    """CRC-32 of the bytes between each two bounds."""
    with shard.open("rb") as file:
        file.seek(bounds[0])
        return [zlib.crc32(file.read(stop - start)) for start, stop in pairwise(bounds)]
