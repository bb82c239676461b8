"""The contents of one tar, without its images: by a walk over its headers, or by the index file beside it."""

import hashlib
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
from ssmpretrain.base.whole_files import replace_json
from ssmpretrain.datamodules.files.image_files import IMAGE_EXTENSIONS
from ssmpretrain.datamodules.files.local_files import MOST_INDEX, WrongFile, open_plain, read_within
from ssmpretrain.datamodules.tar.index_flaws import checksum_of_index, find_flaw, find_layout_flaw
from ssmpretrain.datamodules.tar.walk import first_sample, walk_tar

VERSION = 1
LABEL_EXTENSIONS = ("cls", "json")
_FIELDS = ("samples", "bytes", "sha256", "extensions")


@dataclass(frozen=True)
class ShardIndex:
    """The contents of one tar file of samples.

    Args:
        path: The tar file, on a local disk or on a server.
        samples: Number of samples: runs of members that share a key.
        bytes: Size of the tar file.
        extensions: Members per extension, as {"jpg": 1000, "cls": 1000}; empty where only `samples` is known.
        sha256: Checksum of the tar file in hexadecimal, or empty when it was not computed.
        indexed: Whether this comes from an index file, and not from a walk over the headers.
        mtime_ns: Time of the tar file's last change in ns, or 0 if it is not known.
    """

    path: Any  # a Path, or a shard on a server, of which this folder knows nothing
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

    @property
    def num_unlabelled(self) -> int:
        """Number of samples that have no member that could hold a label, as far as is known."""
        labelled = sum(self.extensions.get(extension, 0) for extension in LABEL_EXTENSIONS)
        return max(0, min(self.samples, self.images) - labelled) if self.extensions else 0


class Layout(NamedTuple):
    """Places of the samples of a tar, and what is known of each.

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
    """Return the path of a tar's index: `train-000000.tar` -> `train-000000.index.json`."""
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
    replace_json(path or index_path(shard), {**content, "check": checksum_of_index(content)}, indent=None)
    return index


def read_index(path: Path, shard: Any = None) -> tuple[ShardIndex, Layout]:
    """Read the index file of a shard: what is in it, and where each sample lies.

    Raises:
        DataError: If it is not an index file, or contradicts itself.
        OSError: If it cannot be read.
    """
    try:
        content = _parse(read_within(path, MOST_INDEX))
        flaw = "" if content is None else find_flaw(content) or find_layout_flaw(content)
    except WrongFile as error:
        content, flaw = None, f"cannot be read ({error.strerror})"
    except RecursionError:
        content, flaw = None, "is nested beyond reason"
    if content is None or flaw:
        flaw = flaw or f"is not an index of version {VERSION}"
        raise DataError(f"{path}: {flaw}. Delete it, or write it anew with `ssmpretrain shards index`.")
    crc32 = content.get("crc32")
    layout = Layout(
        np.asarray(content["offsets"], dtype=np.int64),
        None if crc32 is None else np.asarray(crc32, dtype=np.int64),
        frozenset(content.get("repeated", ())),
    )
    return index_from(content, shard or path), layout


def recall_index(path: Path) -> tuple[ShardIndex, Layout]:
    """Read an index as `read_index` does, and remember it while the file does not change."""
    status = path.stat()
    return _read_index(path, status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _read_index(path: Path, inode: int, size: int, mtime_ns: int) -> tuple[ShardIndex, Layout]:
    # All but the path are there for the cache to tell an index from one written anew.
    return read_index(path)


def locate_samples(tar: Path, size: int | None = None) -> Layout:
    """Locate the samples of a tar by its index, or by a walk over its headers if it has none.

    An index that is broken or leaves out the first samples is ignored.

    Args:
        tar: The file.
        size: Bytes of the tar that the index must give, else it belongs to another file; None accepts any index.

    Raises:
        OSError: If the tar is gone or cannot be read.
    """
    with suppress(FileNotFoundError, DataError):
        index, layout = recall_index(index_path(tar))
        first = int(layout.offsets[0]) if index.samples else 0
        if size in (None, index.bytes) and (first == 0 or first_sample(tar) == first):
            return layout
    walked = walk_tar(tar)
    return Layout(walked.offsets, None, walked.repeated)


def read_index_head(head: bytes, path: Any) -> ShardIndex | None:
    """Read the first bytes of an index file, up to the offsets; None if they are not those of one."""
    opening, separator, _ = head.partition(b', "offsets": [')
    content = _parse(opening + b"}") if separator else None
    return None if content is None or find_flaw(content) else index_from(content, path)


def contents_of(index: ShardIndex) -> dict[str, Any]:
    """Return an index as files have it, without its path and offsets."""
    return {name: getattr(index, name) for name in _FIELDS}


def index_from(content: dict[str, Any], path: Any) -> ShardIndex:
    """Return the index that `contents_of` gave."""
    return ShardIndex(path, **{name: content[name] for name in _FIELDS}, indexed=True)


def parse_json(text: bytes) -> Any:
    """Parse a JSON text; None if it is none, or is nested or long beyond reason."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def walk(shard: Path) -> tuple[ShardIndex, NDArray[np.int64]]:
    """Count and locate the samples of a shard by its tar headers alone; remembered while the file does not change.

    Returns:
        The contents, and the byte offset of each sample's first header, (samples,), int64.

    Raises:
        DataError: If it is not a complete tar file.
    """
    stat, walked = shard.stat(), walk_tar(shard)
    if walked.damage:
        raise DataError(f"{shard}: {walked.damage}")
    index = ShardIndex(shard, len(walked.offsets), stat.st_size, walked.extensions, mtime_ns=stat.st_mtime_ns)
    return index, walked.offsets


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open_plain(path) as file:
        return checksum_of(file.fileno())


def checksum_of(file: int) -> str:
    """Return the SHA-256 of the file that a descriptor has open, in hexadecimal; its position stays."""
    digest, place = hashlib.sha256(), 0
    while block := os.pread(file, 1 << 20, place):
        digest.update(block)
        place += len(block)
    return digest.hexdigest()


def _parse(text: bytes) -> dict[str, Any] | None:
    content = parse_json(text)
    return content if isinstance(content, dict) and content.get("version") == VERSION else None


def _crc32_of_samples(shard: Path, bounds: list[int]) -> list[int]:
    """Return the CRC-32 of the bytes between each two bounds."""
    with open_plain(shard) as file:
        return [_crc32(file.fileno(), start, stop) for start, stop in pairwise(bounds)]


def _crc32(file: int, start: int, stop: int) -> int:
    crc32 = 0
    while content := os.pread(file, min(stop - start, 1 << 24), start):
        crc32 = zlib.crc32(content, crc32)
        start += len(content)
    return crc32
