"""One sample of a tar: reading its bytes, splitting them into fields, and finding damage."""

import os
import zlib
from typing import Any, NamedTuple

from webdataset.tariterators import base_plus_ext

from ssmpretrain.datamodules.faults.bad_samples import BadSample
from ssmpretrain.datamodules.tar.headers import BadHeader, Member, read_sample_members

RawSample = dict[str, Any]  # "__key__", "__url__", and one entry of bytes per extension

_MOST_BYTES = 1 << 30  # bytes of one sample; no image is so large


class Span(NamedTuple):
    """The place of a sample in its tar.

    Args:
        start: Byte offset of the first header of the sample.
        stop: Byte offset of the next sample, or the size of the file.
        last: Whether this is the last sample of the file. The end mark of the archive must follow it.
        crc32: Checksum of the bytes in the index; None if it is not known.
    """

    start: int
    stop: int
    last: bool = False
    crc32: int | None = None


def read_sample(file: int, span: Span, url: str) -> RawSample:
    """Read one sample from a tar that is open; return its fields, undecoded.

    Args:
        file: Descriptor of the tar.
        span: Place of the sample in the tar.
        url: Name of the tar; kept as the `__url__` of the sample.

    Raises:
        BadSample: If no sample can lie at this place, or as `parse_sample`.
        OSError: If the tar cannot be read.
    """
    size = span.stop - span.start
    if size <= 0:
        raise BadSample("changed shards", f"it has {span.stop:,} bytes, and a sample at byte {span.start:,}")
    if size > _MOST_BYTES:
        raise BadSample("giant samples", f"{size:,} bytes")
    return parse_sample(os.pread(file, size, span.start), span, url)


def parse_sample(content: bytes, span: Span, url: str) -> RawSample:
    """Split the bytes of one sample into its fields, undecoded.

    Args:
        content: The bytes of the span; fewer if the file ends early.
        span: Place of the sample in the tar.
        url: Name of the tar; kept as the `__url__` of the sample.

    Raises:
        BadSample: If the bytes end early, differ from the index, or are not one whole sample.
    """
    if len(content) < span.stop - span.start:
        raise BadSample("truncated shards", f"it ends at byte {span.start + len(content):,}")
    try:
        sample, end = _parse(content)
    except BadHeader as error:
        raise BadSample("damaged samples", f"{error}; byte {span.start + error.place:,}") from None
    rest = content[end:]
    if rest.count(0) < len(rest):
        raise BadSample("damaged samples", f"no tar header at byte {span.start + end:,}", _key(sample))
    if span.last and not rest:
        raise BadSample("truncated shards", f"it ends at byte {span.stop:,}, without the mark of its end", _key(sample))
    if not sample:
        raise BadSample("damaged samples", f"no sample at byte {span.start:,}")
    if span.crc32 is not None and zlib.crc32(content) != span.crc32:
        raise BadSample("damaged samples", "its bytes are not those that were indexed", _key(sample))
    return {**sample, "__url__": url}


def _parse(content: bytes) -> tuple[RawSample, int]:
    """Return the fields of a sample, and the byte at which its last entry ends."""
    members, end = read_sample_members(content)
    sample: RawSample = {}
    for member in members:
        key, extension = base_plus_ext(member.name)
        if key != sample.setdefault("__key__", key):
            if member.special:  # a link that begins the next sample; older indexes do not list links
                continue
            raise BadSample("damaged samples", f"{key} follows: its index is of another file", _key(sample))
        _add(sample, member, extension.lower(), content)
    return sample, end


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
