"""Read any sample of a shard as raw bytes, and notice what is wrong with the file that it lies in."""

import errno
import os
import re
import tarfile
import time
import zlib
from collections.abc import Callable
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

# Read by webdataset when it is imported: its openers then start no shell and its decoders unpickle nothing. Neither is
# called here; this keeps the door closed for whatever else imports webdataset in this process.
os.environ.setdefault("WDS_SECURE", "1")

from webdataset.tariterators import base_plus_ext

from ssmpretrain.datamodules.bad_samples import BadSample

__all__ = ["RawSample", "base_plus_ext", "is_sample_member", "read_sample", "retried"]

T = TypeVar("T")
RawSample = dict[str, Any]  # "__key__", "__url__", and one entry of bytes per extension

_PASSING = {errno.EIO, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET, errno.EBUSY}
_WAITS = (0.1, 0.5, 2.0)  # seconds before a file is opened again, as servers of files need when they restart
_MOST_BYTES = 1 << 30  # of one sample: more would be read into memory for nothing, as no image is so large
_SKIPPED = re.compile(r"__[^/]*__($|/)")  # webdataset's own members, which its reader passes over too


def read_sample(shard: Path, start: int, stop: int, *, last: bool = False, crc32: int | None = None) -> RawSample:
    """Read one sample of a shard, undecoded, and nothing else of it.

    Args:
        shard: The tar file.
        start: Byte at which the sample's first header begins (`load_offsets`).
        stop: Byte at which the next sample's begins, or the size of the file.
        last: Whether it is the file's last: then the mark that ends an archive must follow.
        crc32: Checksum of these bytes when they were indexed; None if it is not known.

    Raises:
        BadSample: If the file is gone or cannot be read, ends early, or does not hold one whole sample there.
    """
    if stop - start > _MOST_BYTES:
        raise BadSample("giant samples", f"{stop - start:,} bytes")
    content = retried(shard, lambda file: os.pread(file.fileno(), stop - start, start))
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


def retried(shard: Path, action: Callable[[BinaryIO], T]) -> T:
    """Do something with an open shard; it is opened again and retried, for a few seconds, where that may help.

    Raises:
        BadSample: If the file is gone or cannot be read.
    """
    for wait in (*_WAITS, None):
        try:
            return action(_opened(shard))
        except FileNotFoundError:
            raise BadSample("missing shards", "no such file") from None
        except OSError as error:
            _opened.cache_clear()  # a stale handle stays stale
            if wait is None or error.errno not in _PASSING:
                raise BadSample("unreadable shards", error.strerror or str(error)) from None
            time.sleep(wait)
    raise AssertionError


@lru_cache(maxsize=64)
def _opened(shard: Path) -> BinaryIO:
    """A shard that stays open, and is read to its end even if it is removed meanwhile; closed when it is forgotten."""
    return shard.open("rb", buffering=0)


def is_sample_member(member: tarfile.TarInfo) -> bool:
    """Whether an entry of a tar belongs to a sample: not folders, webdataset's own members, names without extension."""
    return not member.isdir() and base_plus_ext(member.name)[0] is not None and not _SKIPPED.match(member.name)


def _parse(content: bytes) -> tuple[RawSample, int]:
    """The fields of a sample, and where its last entry ends."""
    sample: RawSample = {}
    with tarfile.TarFile(fileobj=BytesIO(content)) as tar:
        for member in tar:
            if not is_sample_member(member):
                continue
            key, extension = base_plus_ext(member.name)
            if key != sample.setdefault("__key__", key):
                if not member.isreg():  # a link that begins the next sample, of an index that knows no links
                    continue
                raise BadSample("damaged samples", f"{key} follows: its index is of another file", _key(sample))
            _add(sample, member, extension.lower(), content)
        end = tar.offset
    return sample, end


def _add(sample: RawSample, member: tarfile.TarInfo, extension: str, content: bytes) -> None:
    if not member.isreg() or member.issparse():
        kind = "a sparse file" if member.issparse() else "a link" if member.islnk() or member.issym() else "a device"
        raise BadSample("links and other special files", f"{member.name} is {kind}", _key(sample))
    if extension in sample:
        raise BadSample("samples with a field twice", f".{extension}", _key(sample))
    field = content[member.offset_data : member.offset_data + member.size]
    if len(field) < member.size:
        raise BadSample("damaged samples", f"{member.name} is longer than the sample", _key(sample))
    sample[extension] = field


def _key(sample: RawSample) -> str:
    return str(sample.get("__key__", ""))
