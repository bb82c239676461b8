"""Where the samples of a tar file lie, by its headers alone; also of a damaged one, as far as they can be found."""

import re
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from webdataset.tariterators import base_plus_ext

_BLOCK = tarfile.BLOCKSIZE
_SKIPPED = re.compile(r"__[^/]*__($|/)")  # webdataset's own members, which its reader passes over too
_WINDOW = 1 << 20  # bytes searched at a time, whole blocks
_MAGIC, _MAGIC_AT = b"ustar", 257  # of every header since 1988, and where in it


@dataclass(frozen=True)
class Walked:
    """What the headers of a tar file say.

    Args:
        offsets: Byte offset of each sample's first header, (samples,), int64. Samples are runs of members of one key.
        extensions: Members per extension, as {"jpg": 1000, "cls": 1000}.
        repeated: Numbers of the samples whose key an earlier sample has.
        damage: What is wrong with the file, as "is truncated after sample 612 (...)"; empty if it is whole.
    """

    offsets: NDArray[np.int64]
    extensions: dict[str, int]
    repeated: frozenset[int]
    damage: str


def walk_tar(shard: Path) -> Walked:
    """Walk over the headers of a tar file; remembered while the file does not change.

    Raises:
        OSError: If it cannot be read.
    """
    stat = shard.stat()
    return _walk(shard, stat.st_size, stat.st_mtime_ns)


def is_sample_member(member: tarfile.TarInfo) -> bool:
    """Whether an entry of a tar belongs to a sample: not folders, webdataset's own members, names without extension."""
    return not member.isdir() and is_sample_name(member.name)


def is_sample_name(name: str) -> bool:
    """Whether a file of this name belongs to a sample."""
    return base_plus_ext(name)[0] is not None and not _SKIPPED.match(name)


@dataclass
class _Found:
    offsets: list[int] = field(default_factory=list)
    extensions: Counter[str] = field(default_factory=Counter)
    keys: set[str] = field(default_factory=set)
    repeated: set[int] = field(default_factory=set)
    current: str = ""

    def add(self, member: tarfile.TarInfo) -> None:
        key, extension = base_plus_ext(member.name)
        self.extensions[extension.lower()] += 1
        if key != self.current:
            if key in self.keys:
                self.repeated.add(len(self.offsets))
            self.keys.add(key)
            self.offsets.append(member.offset)
            self.current = key


@lru_cache(maxsize=200_000)
def _walk(shard: Path, size: int, mtime_ns: int) -> Walked:
    # Size and time are there for the cache to tell a file from another of the same name.
    found, damage, place = _Found(), "", 0
    with shard.open("rb") as file:
        while True:
            place, reason = _follow(file, place, found)
            if not reason:
                break
            before = len(found.offsets)
            resumed = _next_header(file, place + _BLOCK, size)
            damage = damage or _diagnose(file, reason, before, truncated=resumed is None)
            if resumed is None:
                break
            place, found.current = resumed, ""
    return Walked(np.asarray(found.offsets, dtype=np.int64), dict(found.extensions), frozenset(found.repeated), damage)


def _follow(file: BinaryIO, place: int, found: _Found) -> tuple[int, str]:
    """Collect members from a header on: where they end, and why that is not the end of the archive, if it is not."""
    file.seek(place)
    tar = None
    try:
        with tarfile.TarFile(fileobj=file) as tar:
            for member in tar:
                if is_sample_member(member):
                    found.add(member)
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every member otherwise
    except tarfile.TarError as error:
        return place if tar is None else tar.offset, str(error)
    # tarfile takes a damaged header in mid-file for the end; a whole archive ends in a block of zeros.
    file.seek(tar.offset)
    if file.read(_BLOCK) != bytes(_BLOCK):
        return tar.offset, "no end-of-archive block"
    while rest := file.read(_WINDOW):
        if rest.count(0) < len(rest):
            return tar.offset, "more data after its end"
    return tar.offset, ""


def _next_header(file: BinaryIO, place: int, size: int) -> int | None:
    """Where the next header lies that is a sample's, at a whole number of blocks from the start of the file."""
    for start in range(place, size, _WINDOW):
        file.seek(start)
        window = file.read(_WINDOW)
        at = window.find(_MAGIC)
        while at >= 0:
            header = at - _MAGIC_AT
            if header >= 0 and header % _BLOCK == 0 and _is_header(window[header : header + _BLOCK]):
                return start + header
            at = window.find(_MAGIC, at + 1)
    return None


def _is_header(block: bytes) -> bool:
    try:
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return base_plus_ext(member.name)[0] is not None


def _diagnose(file: BinaryIO, reason: str, samples: int, *, truncated: bool) -> str:
    """Say what the file is, if it is not a whole tar."""
    file.seek(0)
    head = file.read(512)
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
