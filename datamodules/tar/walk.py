"""Walk over the headers of a tar file to find its samples, also in a damaged file as far as possible."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from webdataset.tariterators import base_plus_ext

from ssmpretrain.datamodules.files.local_files import open_plain
from ssmpretrain.datamodules.tar.headers import BLOCK, BadHeader, Member, is_header, is_sample_member, read_member

_WINDOWS = (16 << 10, 1 << 20)  # bytes searched at a time, first and at most; the next header is often near
_MAGIC, _MAGIC_AT = b"ustar", 257  # mark in every header since 1988, and its place


@dataclass(frozen=True)
class Walked:
    """Result of a walk over the headers of a tar file.

    Args:
        offsets: Byte offset of the first header of each sample, (samples,), int64. Consecutive members with the same
            key form one sample.
        extensions: Number of members with each extension, as {"jpg": 1000, "cls": 1000}.
        repeated: Numbers of the samples whose key an earlier sample already has.
        damage: Description of the damage, as "is truncated after sample 612 (...)"; empty if the file is whole.
    """

    offsets: NDArray[np.int64]
    extensions: dict[str, int]
    repeated: frozenset[int]
    damage: str


def walk_tar(shard: Path) -> Walked:
    """Walk over the headers of a tar file. The result is kept in memory as long as the file does not change.

    Raises:
        OSError: If the file cannot be read.
    """
    stat = shard.stat()
    return _walk(shard, stat.st_size, stat.st_mtime_ns)


def first_sample(shard: Path) -> int | None:
    """Return the byte offset of the first sample; None if the archive has no sample or is damaged before it.

    Raises:
        OSError: If the file cannot be read.
    """
    with open_plain(shard) as file, suppress(BadHeader):
        tar, place = _Tar(file.fileno(), os.fstat(file.fileno()).st_size), 0
        while (member := read_member(tar.read, place)) is not None:
            if is_sample_member(member):
                return member.offset
            place = member.end
    return None


@dataclass
class _Found:
    offsets: list[int] = field(default_factory=list)
    extensions: Counter[str] = field(default_factory=Counter)
    keys: set[str] = field(default_factory=set)
    repeated: set[int] = field(default_factory=set)
    current: str = ""

    def add(self, member: Member) -> None:
        key, extension = base_plus_ext(member.name)
        self.extensions[extension.lower()] += 1
        if key != self.current:
            if key in self.keys:
                self.repeated.add(len(self.offsets))
            self.keys.add(key)
            self.offsets.append(member.offset)
            self.current = key


@dataclass(frozen=True)
class _Tar:
    """An open tar file, read up to the size that it had when it was opened."""

    descriptor: int
    size: int

    def read(self, place: int, count: int) -> bytes:
        return os.pread(self.descriptor, min(count, self.size - place), place) if place < self.size else b""

    def windows(self, place: int) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, bytes) of the file from a block on, in pieces of whole blocks; skip holes, which are zeros."""
        width, widest = _WINDOWS
        while place < self.size:
            try:
                place = os.lseek(self.descriptor, place, os.SEEK_DATA) // BLOCK * BLOCK
            except OSError:  # the rest is a hole
                return
            yield place, self.read(place, width)
            place, width = place + width, min(2 * width, widest)


@lru_cache(maxsize=200_000)
def _walk(shard: Path, size: int, mtime_ns: int) -> Walked:
    # The time is part of the cache's key, so that a rewritten file is read again.
    found, damage, place = _Found(), "", 0
    with open_plain(shard) as file:
        tar = _Tar(file.fileno(), size)
        while True:
            place, reason = _follow(tar, place, found)
            if not reason:
                break
            before = len(found.offsets)
            resumed = _next_header(tar, place + BLOCK)
            damage = damage or _diagnose(file, reason, before, truncated=resumed is None)
            if resumed is None:
                break
            place, found.current = resumed, ""
    return Walked(np.asarray(found.offsets, dtype=np.int64), dict(found.extensions), frozenset(found.repeated), damage)


def _follow(tar: _Tar, place: int, found: _Found) -> tuple[int, str]:
    """Collect the members from a header on.

    Returns:
        The byte offset at which the walk stopped, and the damage found there; empty at the proper end of the archive.
    """
    try:
        while (member := read_member(tar.read, place)) is not None:
            if is_sample_member(member):
                found.add(member)
            place = member.end
            if place > tar.size:
                return place, "unexpected end of data"
    except BadHeader as error:
        return error.place, str(error)
    if tar.read(place, BLOCK) != bytes(BLOCK):
        return place, "no end-of-archive block"
    if any(window.count(0) < len(window) for _, window in tar.windows(place)):
        return place, "more data after its end"
    return place, ""


def _next_header(tar: _Tar, place: int) -> int | None:
    """Return the byte offset of the next header, a multiple of the block size; None if there is none."""
    for start, window in tar.windows(place):
        at = window.find(_MAGIC)
        while at >= 0:
            header = at - _MAGIC_AT
            if header >= 0 and header % BLOCK == 0 and is_header(window[header : header + BLOCK]):
                return start + header
            at = window.find(_MAGIC, at + 1)
    return None


def _diagnose(file: BinaryIO, reason: str, samples: int, *, truncated: bool) -> str:
    """Describe what is wrong with a file that is not a whole tar."""
    file.seek(0)
    head = file.read(BLOCK)
    if not head:
        return "is empty (0 bytes). Fetch it again."
    if head.lstrip()[:1] == b"<":
        title = re.search(rb"<title>\s*(.*?)\s*</title>", head, re.IGNORECASE | re.DOTALL)
        named = f" ({title.group(1).decode(errors='replace')[:60]!r})" if title else ""
        return f"is a web page{named}, not a tar file: the download failed. Fetch it again."
    if head[:2] == b"\x1f\x8b":
        return "is compressed with gzip; shards are plain tar files. Unpack it with `gunzip`."
    if not truncated:
        return f"is damaged after sample {samples:,} ({reason}). Fetch it again."
    if samples:
        return f"is truncated after sample {samples:,} ({reason}). Fetch it again."
    return f"is not a tar file ({reason}). Fetch it again, or remove it from the list."
