"""Read any sample of a shard as raw bytes, and notice what is wrong with the file that it lies in."""

import os
import zlib
from collections.abc import Callable
from typing import Any

from webdataset.tariterators import base_plus_ext

from ssmpretrain.base.errors import SourceError
from ssmpretrain.datamodules.bad_samples import BadSample
from ssmpretrain.datamodules.files.local_files import T, patiently
from ssmpretrain.datamodules.shards.sources import Shard, close_local, opened
from ssmpretrain.datamodules.shards.tar_headers import BadHeader, Member, read_member
from ssmpretrain.datamodules.shards.tar_walk import any_but_zeros, is_sample_member

RawSample = dict[str, Any]  # "__key__", "__url__", and one entry of bytes per extension

_MOST_BYTES = 1 << 30  # of one sample: more would be read into memory for nothing, as no image is so large


def read_sample(shard: Shard, start: int, stop: int, *, last: bool = False, crc32: int | None = None) -> RawSample:
    """Read one sample of a shard, undecoded, and nothing else of it.

    Args:
        shard: The tar file; one on a server is read from its local copy.
        start: Byte at which the sample's first header begins (`load_layout`).
        stop: Byte at which the next sample's begins, or the size of the file.
        last: Whether it is the file's last: then the mark that ends an archive must follow.
        crc32: Checksum of these bytes when they were indexed; None if it is not known.

    Raises:
        BadSample: If the file is gone, cannot be had or read, ends early, or does not hold one whole sample there.
    """
    if stop <= start:
        raise BadSample("changed shards", f"it has {stop:,} bytes, and a sample at byte {start:,}")
    if stop - start > _MOST_BYTES:
        raise BadSample("giant samples", f"{stop - start:,} bytes")
    content = retried(shard, lambda file: os.pread(file, stop - start, start))
    if len(content) < stop - start:
        raise BadSample("truncated shards", f"it ends at byte {start + len(content):,}")
    try:
        sample, end = _parse(content)
    except BadHeader as error:
        raise BadSample("damaged samples", f"{error}; byte {start + error.place:,}") from None
    rest = content[end:]
    if any_but_zeros(rest):
        raise BadSample("damaged samples", f"no tar header at byte {start + end:,}", _key(sample))
    if last and not rest:
        raise BadSample("truncated shards", f"it ends at byte {stop:,}, without the mark of its end", _key(sample))
    if not sample:
        raise BadSample("damaged samples", f"no sample at byte {start:,}")
    if crc32 is not None and zlib.crc32(content) != crc32:
        raise BadSample("damaged samples", "its bytes are not those that were indexed", _key(sample))
    return {**sample, "__url__": str(shard)}


def retried(shard: Shard, action: Callable[[int], T]) -> T:
    """Do something with a shard's file descriptor; retried with the file opened anew, where that may help.

    Raises:
        BadSample: If the file is gone or cannot be read, or its server does not give it.
    """

    def attempt() -> T:
        with opened(shard) as file:
            return action(file)

    try:
        return patiently(shard, attempt, between=close_local)
    except SourceError as error:
        raise unavailable(shard, error) from None


def unavailable(shard: Shard, error: SourceError) -> BadSample:
    """What a shard that cannot be had is to each of its samples."""
    return BadSample(error.cause, str(error).removeprefix(f"{shard}: ").rstrip("."))


def _parse(content: bytes) -> tuple[RawSample, int]:
    """The fields of a sample, and where its last entry ends."""
    members, end = _members(content)
    sample: RawSample = {}
    for member in members:
        key, extension = base_plus_ext(member.name)
        if key != sample.setdefault("__key__", key):
            if member.special:  # a link that begins the next sample, of an index that knows no links
                continue
            raise BadSample("damaged samples", f"{key} follows: its index is of another file", _key(sample))
        _add(sample, member, extension.lower(), content)
    return sample, end


def _members(content: bytes) -> tuple[list[Member], int]:
    """The files of a sample, and where the last one ends; raises `BadHeader`."""
    members, place = [], 0
    while (member := read_member(lambda start, count: content[start : start + count], place)) is not None:
        if is_sample_member(member):
            members.append(member)
        place = member.end
    return members, place


def _add(sample: RawSample, member: Member, extension: str, content: bytes) -> None:
    if member.special:
        raise BadSample("links and other special files", f"{member.name} is {member.special}", _key(sample))
    if extension in sample:
        raise BadSample("samples with a field twice", f".{extension}", _key(sample))
    field = content[member.start : member.start + member.size]
    if len(field) < member.size:
        raise BadSample("damaged samples", f"{member.name} is longer than the sample", _key(sample))
    sample[extension] = field


def _key(sample: RawSample) -> str:
    return str(sample.get("__key__", ""))
