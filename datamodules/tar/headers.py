"""Headers of a tar file, read safely: sizes are limited, and each step moves forward in the file.

A shard may come from anybody. Python's `tarfile` is not safe for such files: it follows negative sizes, reads extended
headers of any length into memory, and raises exceptions of many kinds.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from webdataset.tariterators import base_plus_ext

BLOCK = 512  # bytes; headers and contents begin at multiples of this size
_MOST_HEADERS = 8  # extended headers before a file; ustar, pax and GNU together need four
_MOST_EXTENDED = 1 << 20  # bytes of an extended header
_MOST_RECORDS = 1000  # records in a pax header
_MOST_NAME = 4096  # characters of a path; no system has longer paths
_MOST_SIZE = 1 << 62  # bytes of a file
_MOST_SPARSE = 1000  # blocks in the map of a sparse file
_PAX, _GLOBAL, _LONG_NAME, _LONG_LINK, _SPARSE = (b"x", b"X"), b"g", b"L", b"K", b"S"
_LINKS, _FOLDER, _WITHOUT_CONTENT = (b"1", b"2"), b"5", (b"1", b"2", b"3", b"4", b"5", b"6")
_PLAIN = (b"0", b"\0", b"7")
_WORDS = re.compile(rb" path=| size=|GNU\.sparse\.").search  # a pax header without these says nothing about the content
_RECORD = re.compile(rb"(\d{1,9}) ([^=]{1,1000})=").match
_SKIPPED = re.compile(r"__[^/]*__($|/)").match  # members of webdataset itself, which its reader also skips
_octal = re.compile(rb"[0-7]+").fullmatch
_decimal = re.compile(rb"[0-9]{1,19}").fullmatch

Read = Callable[[int, int], bytes]  # (place, count) -> bytes at this place; fewer than count at the end of the file


class BadHeader(Exception):
    """The bytes at a place are not a valid header.

    Args:
        text: Description of the fault.
        place: Byte offset of the last block that was read. A search for further headers starts behind this block.
    """

    def __init__(self, text: str, place: int) -> None:
        super().__init__(text)
        self.place = place


class Member(NamedTuple):
    """One entry of a tar file.

    Args:
        name: Path in the archive; bytes that are not UTF-8 are escaped as surrogates.
        offset: Byte offset of the first header of the entry.
        start: Byte offset of the content.
        size: Size of the content in bytes.
        end: Byte offset of the next header, always larger than `offset`. A truncated file may end earlier.
        special: "a folder", "a link", "a device" or "a sparse file"; empty for a plain file.
    """

    name: str
    offset: int
    start: int
    size: int
    end: int
    special: str


def read_member(read: Read, place: int) -> Member | None:
    """Read the headers of the entry that begins at a place.

    Args:
        read: Reads bytes of the file.
        place: Byte offset of the first header.

    Returns:
        The entry, or None if the place holds zeros or the file ends there.

    Raises:
        BadHeader: If a header is damaged, or has values that no program writes.
    """
    offset, name, size, sparse = place, "", -1, False
    for _ in range(_MOST_HEADERS):
        header = read(place, BLOCK)
        if header.count(0) == len(header):
            if place > offset:
                raise BadHeader("an extended header without a file", place)
            return None
        kind, own_name, own_size = _fields(header, place)
        start = place + BLOCK
        if kind not in (*_PAX, _GLOBAL, _LONG_NAME, _LONG_LINK):
            break
        text = _extended(read, start, own_size)
        if kind == _LONG_NAME:
            name = name or _text(text)
        elif kind != _LONG_LINK:
            last = start + _filled(own_size) - BLOCK
            said = _records(text, last)
            if kind == _GLOBAL and said:
                raise BadHeader("a name or a size for all files that follow", last)
            sparse = sparse or any(key.startswith(b"GNU.sparse.") for key in said)
            path = said.get(b"GNU.sparse.name", said.get(b"path", b"").rstrip(b"/"))
            name = name or path.decode("utf-8", "surrogateescape")
            size = size if size >= 0 else _pax_size(said, last)
        place = start + _filled(own_size)
        offset = place if kind == _GLOBAL and offset == start - BLOCK else offset
    else:
        raise BadHeader(f"more than {_MOST_HEADERS} extended headers in a row", place)
    if len(name) > _MOST_NAME:
        raise BadHeader(f"a name of {len(name):,} characters", place)
    size = own_size if size < 0 else size
    if kind == _SPARSE:
        start = _after_sparse_map(read, header, start)
    special = "a sparse file" if sparse or kind == _SPARSE else _special(kind, own_name)
    end = start + (0 if kind in _WITHOUT_CONTENT or special == "a folder" else _filled(size))
    return Member(name or own_name, offset, start, size, end, special)


def is_sample_member(member: Member) -> bool:
    """Return whether an entry of a tar belongs to a sample: a file with an extension that is not webdataset's own."""
    return member.special != "a folder" and base_plus_ext(member.name)[0] is not None and not _SKIPPED(member.name)


def read_sample_members(content: bytes) -> tuple[list[Member], int]:
    """Read the headers in the bytes of one sample.

    Returns:
        The entries that belong to the sample, and the byte at which the last entry ends.

    Raises:
        BadHeader: If a header is damaged.
    """
    members, place = [], 0
    while (member := read_member(lambda start, count: content[start : start + count], place)) is not None:
        if is_sample_member(member):
            members.append(member)
        place = member.end
    return members, place


def is_header(block: bytes) -> bool:
    """Return whether a block of 512 bytes is a header with a correct checksum."""
    try:
        return bool(_fields(block, 0)[1])
    except BadHeader:
        return False


def _fields(header: bytes, place: int) -> tuple[bytes, str, int]:
    """Return the kind, the name and the size that a header gives."""
    if len(header) < BLOCK:
        raise BadHeader("truncated header", place)
    said = _number(header[148:156], place)
    found = sum(header) - sum(header[148:156]) + 256
    if said != found and said != found - 256 * sum(byte > 127 for byte in header[:148] + header[156:]):
        raise BadHeader("bad checksum", place)
    kind, name = header[156:157], _text(header[:100])
    if header[345] and kind not in (_LONG_NAME, _LONG_LINK, _SPARSE):
        name = f"{_text(header[345:500])}/{name}"
    return kind, name, _number(header[124:136], place)


def _number(field: bytes, place: int) -> int:
    """Parse a number field of a header: octal digits, or binary for a number that is too large for octal digits."""
    if field[0] & 0x80:
        if field[0] != 0x80 or (number := int.from_bytes(field[1:], "big")) > _MOST_SIZE:
            raise BadHeader("a negative or impossible size", place)
        return number
    digits = field.partition(b"\0")[0].strip()
    if digits and not _octal(digits):
        raise BadHeader("a number that is not octal", place)
    return int(digits or b"0", 8)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _filled(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _extended(read: Read, start: int, size: int) -> bytes:
    """Return the content of an extended header."""
    if size > _MOST_EXTENDED:
        raise BadHeader(f"an extended header of {size:,} bytes", start - BLOCK)
    text = read(start, size)
    if len(text) < size:
        raise BadHeader("truncated header", start - BLOCK)
    return text


def _records(text: bytes, place: int) -> dict[bytes, bytes]:
    """Return the records of a pax header that give the name or the size of a file, or mark it as sparse."""
    said: dict[bytes, bytes] = {}
    if not _WORDS(text):
        return said
    at = 0
    for _ in range(_MOST_RECORDS):
        if (match := _RECORD(text, at)) is None:
            return said
        length, key = int(match[1]), match[2]
        if not match.end() - at < length <= len(text) - at:
            raise BadHeader("a pax record of impossible length", place)
        if key in (b"path", b"size") or key.startswith(b"GNU.sparse."):
            said[key] = text[match.end() : at + length - 1]
        at += length
    raise BadHeader(f"more than {_MOST_RECORDS:,} pax records", place)


def _pax_size(said: dict[bytes, bytes], place: int) -> int:
    """Return the size in a pax header, or -1 if it has none."""
    if b"size" not in said:
        return -1
    if not _decimal(said[b"size"]) or int(said[b"size"]) > _MOST_SIZE:
        raise BadHeader("a negative or impossible size", place)
    return int(said[b"size"])


def _after_sparse_map(read: Read, header: bytes, start: int) -> int:
    """Return the byte offset of the content of a sparse file in GNU's old format, which follows the map of the file."""
    more = header[482]
    for _ in range(_MOST_SPARSE):
        if not more:
            return start
        block = read(start, BLOCK)
        if len(block) < BLOCK:
            raise BadHeader("truncated header", start - BLOCK)
        more, start = block[504], start + BLOCK
    raise BadHeader(f"a sparse file of more than {_MOST_SPARSE:,} blocks of pieces", start - BLOCK)


def _special(kind: bytes, own_name: str) -> str:
    if kind == _FOLDER or (kind == b"\0" and own_name.endswith("/")):
        return "a folder"
    return "" if kind in _PLAIN else "a link" if kind in _LINKS else "a device"
