"""Read any sample of a shard as raw bytes, and notice what is wrong with the file that it lies in."""

import errno
import os
import re
import tarfile
import time
import zlib
from collections.abc import Callable
from io import BytesIO
from typing import Any, NamedTuple, TypeVar

from webdataset.tariterators import base_plus_ext

from ssmpretrain.datamodules.bad_samples import BadSample
from ssmpretrain.datamodules.errors import SourceError
from ssmpretrain.datamodules.sources import Shard, close_local, descriptor
from ssmpretrain.datamodules.tar_walk import is_sample_member, is_sample_name

T = TypeVar("T")
RawSample = dict[str, Any]  # "__key__", "__url__", and one entry of bytes per extension

_PASSING = {errno.EIO, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET, errno.EBUSY}
_WAITS = (0.1, 0.5, 2.0)  # seconds before a file is opened again, as servers of files need when they restart
_MOST_BYTES = 1 << 30  # of one sample: more would be read into memory for nothing, as no image is so large
_PAX_WORDS = (b" path=", b" size=", b" linkpath=", b"charset=", b"GNU.sparse.")  # more than a time or an owner
_OCTAL = re.compile(rb"[0-7]+").fullmatch


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
    if stop - start > _MOST_BYTES:
        raise BadSample("giant samples", f"{stop - start:,} bytes")
    content = retried(shard, lambda file: os.pread(file, stop - start, start))
    if len(content) < stop - start:
        raise BadSample("truncated shards", f"it ends at byte {start + len(content):,}")
    try:
        sample, end = _parse(content)
    except tarfile.TarError as error:
        raise BadSample("damaged samples", f"{error}; byte {start:,}") from None
    rest = content[end:]
    if rest.count(0) < len(rest):
        raise BadSample("damaged samples", f"no tar header at byte {start + end:,}", _key(sample))
    if last and not rest:
        raise BadSample("truncated shards", f"it ends at byte {stop:,}, without the mark of its end", _key(sample))
    if not sample:
        raise BadSample("damaged samples", f"no sample at byte {start:,}")
    if crc32 is not None and zlib.crc32(content) != crc32:
        raise BadSample("damaged samples", "its bytes are not those that were indexed", _key(sample))
    return {**sample, "__url__": str(shard)}


def retried(shard: Shard, action: Callable[[int], T]) -> T:
    """Do something with a shard's file descriptor; retried for a few seconds, opened anew, where that may help.

    Raises:
        BadSample: If the file is gone or cannot be read, or its server does not give it.
    """
    for wait in (*_WAITS, None):
        try:
            return action(descriptor(shard))
        except SourceError as error:
            raise unavailable(shard, error) from None
        except FileNotFoundError:
            raise BadSample("missing shards", "no such file") from None
        except OSError as error:
            close_local()  # a stale handle stays stale
            if wait is None or error.errno not in _PASSING:
                raise BadSample("unreadable shards", error.strerror or str(error)) from None
            time.sleep(wait)
    raise AssertionError


def unavailable(shard: Shard, error: SourceError) -> BadSample:
    """What a shard that cannot be had is to each of its samples."""
    return BadSample(error.cause, str(error).removeprefix(f"{shard}: ").rstrip("."))


class _Entry(NamedTuple):
    """A file in the bytes of a sample: its name, where its content lies, and what it is if no plain file."""

    name: str
    start: int
    size: int
    special: str = ""


def _parse(content: bytes) -> tuple[RawSample, int]:
    """The fields of a sample, and where its last entry ends."""
    entries, end = _plain_entries(content) or _entries(content)
    sample: RawSample = {}
    for entry in entries:
        key, extension = base_plus_ext(entry.name)
        if key != sample.setdefault("__key__", key):
            if entry.special:  # a link that begins the next sample, of an index that knows no links
                continue
            raise BadSample("damaged samples", f"{key} follows: its index is of another file", _key(sample))
        _add(sample, entry, extension.lower(), content)
    return sample, end


def _plain_entries(content: bytes) -> tuple[list[_Entry], int] | None:
    """`_entries` four times as fast, of the plain files that nearly all shards consist of; None of anything else."""
    entries, place = [], 0
    while len(header := content[place : place + 512]) == 512 and header[0]:
        kind, number = header[156:157], header[124:135]
        if header[257:262] != b"ustar" or header[345] or not _OCTAL(number) or not _OCTAL(header[148:154]):
            return None
        if int(header[148:154], 8) != sum(header) - sum(header[148:156]) + 256:
            return None
        start, size = place + 512, int(number, 8)
        place = start + (size + 511) // 512 * 512
        if kind in (b"0", b"\0"):
            name = header[: header.index(0)] if 0 in header[:100] else header[:100]
            if name.endswith(b"/"):
                return None
            entries.append(_Entry(name.decode("utf-8", "surrogateescape"), start, size))
        elif kind != b"x" or any(word in content[start : start + size] for word in _PAX_WORDS):
            return None
    return [entry for entry in entries if is_sample_name(entry.name)], place


def _entries(content: bytes) -> tuple[list[_Entry], int]:
    """The files of a sample, and where the last one ends; raises `tarfile.TarError`."""
    entries = []
    with tarfile.TarFile(fileobj=BytesIO(content)) as tar:
        for member in filter(is_sample_member, tar):
            special = "a sparse file" if member.issparse() else "" if member.isreg() else "a device"
            special = "a link" if member.islnk() or member.issym() else special
            entries.append(_Entry(member.name, member.offset_data, member.size, special))
        end = tar.offset
    return entries, end


def _add(sample: RawSample, entry: _Entry, extension: str, content: bytes) -> None:
    if entry.special:
        raise BadSample("links and other special files", f"{entry.name} is {entry.special}", _key(sample))
    if extension in sample:
        raise BadSample("samples with a field twice", f".{extension}", _key(sample))
    field = content[entry.start : entry.start + entry.size]
    if len(field) < entry.size:
        raise BadSample("damaged samples", f"{entry.name} is longer than the sample", _key(sample))
    sample[extension] = field


def _key(sample: RawSample) -> str:
    return str(sample.get("__key__", ""))
