"""Index of one tar: number, extensions and places of its samples, from an index file or a walk over the headers."""

import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ssmpretrain.base.errors import DataError
from ssmpretrain.base.whole_files import replace_json, sha256_of
from ssmpretrain.datamodules.files.image_files import IMAGE_EXTENSIONS
from ssmpretrain.datamodules.files.local_files import MOST_INDEX, WrongFile, open_plain, read_within
from ssmpretrain.datamodules.tar.index_flaws import checksum_of_index, find_flaw, find_layout_flaw
from ssmpretrain.datamodules.tar.walk import first_sample, walk_tar

VERSION = 1
LABEL_EXTENSIONS = ("cls", "json")
_FIELDS = ("samples", "bytes", "sha256", "extensions")


@dataclass(frozen=True)
class ShardIndex:
    """Summary of one tar file of samples.

    Args:
        path: The tar file, on a local disk or on a server.
        samples: Number of samples. Consecutive members with the same key form one sample.
        bytes: Size of the tar file in bytes.
        extensions: Number of members with each extension, as {"jpg": 1000, "cls": 1000}; empty if it is not known.
        sha256: Checksum of the tar file in hexadecimal, or empty if it was not computed.
        indexed: Whether an index file gave these values; otherwise a walk over the headers did.
        mtime_ns: Time of the last change of the tar file in ns, or 0 if it is not known.
    """

    path: Any  # a Path, or a RemoteShard, whose class this folder does not import
    samples: int
    bytes: int
    extensions: dict[str, int]
    sha256: str = ""
    indexed: bool = False
    mtime_ns: int = 0

    @property
    def images(self) -> int:
        """Number of members that are images. If the members are not known, the number of samples."""
        if not self.extensions:
            return self.samples
        return sum(self.extensions.get(extension, 0) for extension in IMAGE_EXTENSIONS)

    @property
    def may_have_labels(self) -> bool:
        """Whether the tar may have members with labels; true if the members are not known."""
        return not self.extensions or not self.extensions.keys().isdisjoint(LABEL_EXTENSIONS)

    @property
    def num_unlabelled(self) -> int:
        """Smallest number of samples that cannot have a label; 0 if the members are not known."""
        labelled = sum(self.extensions.get(extension, 0) for extension in LABEL_EXTENSIONS)
        return max(0, min(self.samples, self.images) - labelled) if self.extensions else 0


class Layout(NamedTuple):
    """Places and checksums of the samples of a tar.

    Args:
        offsets: Byte offset of the first tar header of each sample, (samples,), int64.
        crc32: Checksum of the bytes from each sample up to the next, (samples,), int64, or None if it is not known.
        repeated: Numbers of the samples whose key an earlier sample of the tar already has.
    """

    offsets: NDArray[np.int64]
    crc32: NDArray[np.int64] | None
    repeated: frozenset[int]


def describe_several_images(shards: Iterable[tuple[int, Mapping[str, int]]]) -> str:
    """Return a sentence that says which image is read if samples have several; empty if no shard has such samples.

    Args:
        shards: For each shard, the number of samples, and the number of members with each extension.
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
    """Return the path of a tar's index: `train-000000.tar` -> `train-000000.index.json`."""
    return shard.with_name(shard.name.removesuffix(".tar") + ".index.json")


def write_index(shard: Path, path: Path | None = None, *, sha256: str = "") -> ShardIndex:
    """Walk over the headers of a shard and write its index file, complete or not at all.

    Args:
        shard: The tar file.
        path: Path of the index file; None for the usual path beside the shard.
        sha256: Checksum of the shard, if it is already known.

    Returns:
        The summary of the shard.

    Raises:
        DataError: If the shard is not a complete tar file.
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
    replace_json(path or index_path(shard), {**content, "check": checksum_of_index(content)}, indent=None)
    return index


def read_index(path: Path, shard: Any = None) -> tuple[ShardIndex, Layout]:
    """Read an index file.

    Args:
        path: The index file.
        shard: The tar file or remote shard that the index describes; becomes the `path` of the result.

    Returns:
        The summary of the shard, and the places of its samples.

    Raises:
        DataError: If the file is not an index, or contradicts itself.
        OSError: If the file cannot be read.
    """
    try:
        content = _parse(read_within(path, MOST_INDEX))
        flaw = "" if content is None else find_flaw(content) or find_layout_flaw(content)
    except WrongFile as error:
        content, flaw = None, f"cannot be read ({error.strerror})"
    except RecursionError:
        content, flaw = None, "is nested too deeply"
    if content is None or flaw:
        flaw = flaw or f"is not an index of version {VERSION}"
        raise DataError(f"{path}: {flaw}. Delete it, or write it again with `ssmpretrain shards index`.")
    crc32 = content.get("crc32")
    layout = Layout(
        np.asarray(content["offsets"], dtype=np.int64),
        None if crc32 is None else np.asarray(crc32, dtype=np.int64),
        frozenset(content.get("repeated", ())),
    )
    return index_from(content, shard or path), layout


def recall_index(path: Path) -> tuple[ShardIndex, Layout]:
    """Return the result of `read_index`, kept in memory as long as the file does not change."""
    status = path.stat()
    return _read_index(path, status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _read_index(path: Path, inode: int, size: int, mtime_ns: int) -> tuple[ShardIndex, Layout]:
    # Inode, size and time are part of the cache's key, so that a rewritten index is read again.
    return read_index(path)


def locate_samples(tar: Path, size: int | None = None) -> Layout:
    """Locate the samples of a tar by its index file, or by a walk over its headers if there is no usable index.

    An index that is damaged or omits the first samples is ignored.

    Args:
        tar: The tar file.
        size: Size in bytes that the index must give; an index with another size belongs to another file. None accepts
            any index.

    Raises:
        OSError: If the tar does not exist or cannot be read.
    """
    with suppress(FileNotFoundError, DataError):
        index, layout = recall_index(index_path(tar))
        first = int(layout.offsets[0]) if index.samples else 0
        if size in (None, index.bytes) and (first == 0 or first_sample(tar) == first):
            return layout
    walked = walk_tar(tar)
    return Layout(walked.offsets, None, walked.repeated)


def read_index_head(head: bytes, path: Any) -> ShardIndex | None:
    """Parse the first bytes of an index file, up to the offsets; return None if they are not from an index file."""
    opening, separator, _ = head.partition(b', "offsets": [')
    content = _parse(opening + b"}") if separator else None
    return None if content is None or find_flaw(content) else index_from(content, path)


def contents_of(index: ShardIndex) -> dict[str, Any]:
    """Return the fields of an index that files store: all but the path and the offsets."""
    return {name: getattr(index, name) for name in _FIELDS}


def index_from(content: dict[str, Any], path: Any) -> ShardIndex:
    """Build an index from the fields that `contents_of` returned."""
    return ShardIndex(path, **{name: content[name] for name in _FIELDS}, indexed=True)


def parse_json(text: bytes) -> Any:
    """Parse a JSON text; return None if it is not valid JSON or is nested too deeply."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def walk(shard: Path) -> tuple[ShardIndex, NDArray[np.int64]]:
    """Count and locate the samples of a shard by its tar headers; kept in memory as long as the file does not change.

    Returns:
        The summary of the shard, and the byte offset of the first header of each sample, (samples,), int64.

    Raises:
        DataError: If the shard is not a complete tar file.
    """
    stat, walked = shard.stat(), walk_tar(shard)
    if walked.damage:
        raise DataError(f"{shard}: {walked.damage}")
    index = ShardIndex(shard, len(walked.offsets), stat.st_size, walked.extensions, mtime_ns=stat.st_mtime_ns)
    return index, walked.offsets


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open_plain(path) as file:
        return sha256_of(file.fileno())


def _parse(text: bytes) -> dict[str, Any] | None:
    content = parse_json(text)
    return content if isinstance(content, dict) and content.get("version") == VERSION else None


def _crc32_of_samples(shard: Path, bounds: list[int]) -> list[int]:
    """Return the CRC-32 of the bytes between each pair of neighbouring bounds."""
    with open_plain(shard) as file:
        return [_crc32(file.fileno(), start, stop) for start, stop in pairwise(bounds)]


def _crc32(file: int, start: int, stop: int) -> int:
    crc32 = 0
    while content := os.pread(file, min(stop - start, 1 << 24), start):
        crc32 = zlib.crc32(content, crc32)
        start += len(content)
    return crc32
