"""The headers of a tar file, whoever wrote it: each is read within bounds, and each step through the file goes on.

`tarfile` follows sizes that are negative, reads extended headers of any length into memory and raises whatever its
parts raise; a shard comes from anybody.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from webdataset.tariterators import base_plus_ext

BLOCK = 512  # bytes; headers begin at multiples of it, and contents are filled up to them
_MOST_HEADERS = 8  # extended ones before a file; ustar, pax and GNU together need four
_MOST_EXTENDED = 1 << 20  # bytes of one
_MOST_RECORDS = 1000  # in a pax header
_MOST_NAME = 4096  # characters; no system has longer paths
_MOST_SIZE = 1 << 62  # bytes of a file
_MOST_SPARSE = 1000  # blocks of the map of a sparse file
_PAX, _GLOBAL, _LONG_NAME, _LONG_LINK, _SPARSE = (b"x", b"X"), b"g", b"L", b"K", b"S"
_LINKS, _FOLDER, _WITHOUT_CONTENT = (b"1", b"2"), b"5", (b"1", b"2", b"3", b"4", b"5", b"6")
_PLAIN = (b"0", b"\0", b"7")
_WORDS = re.compile(rb" path=| size=|GNU\.sparse\.").search  # of a pax header that says more than a time or an owner
_RECORD = re.compile(rb"(\d{1,9}) ([^=]{1,1000})=").match
_SKIPPED = re.compile(r"__[^/]*__($|/)").match  # members of webdataset itself, which its reader also skips
_octal = re.compile(rb"[0-7]+").fullmatch
_decimal = re.compile(rb"[0-9]{1,19}").fullmatch

Read = Callable[[int, int], bytes]  # (place, count) to the bytes there, fewer at the end


class BadHeader(Exception):
    """The bytes at a place are no header that can be followed.

    Args:
        text: What is wrong.
        place: The last block that was looked at: a search for other headers goes on behind it.
    """

    def __init__(self, text: str, place: int) -> None:
        super().__init__(text)
        self.place = place


class Member(NamedTuple):
    """An entry of a tar.

    Args:
        name: Path in the archive; bytes that are not UTF-8 are escaped as surrogates.
        offset: Byte at which its first header begins.
        start: Byte at which its content begins.
        size: Bytes of it.
        end: Where the next header is, always after `offset`; the file may end before.
        special: "a folder", "a link", "a device" or "a sparse file"; empty for a plain file.
    """

    name: str
    offset: int
    start: int
    size: int
    end: int
    special: str


def read_member(read: Read, place: int) -> Member | None:
    """Read the headers of the entry that begins at a place; None if there are zeros or nothing more.

    Raises:
        BadHeader: If it is damaged, or no program would have written it.
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
    """Return whether a block is a header with the right checksum."""
    try:
        return bool(_fields(block, 0)[1])
    except BadHeader:
        return False


def _fields(header: bytes, place: int) -> tuple[bytes, str, int]:
    """Return the kind, the name and the size in a header."""
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
    """Return a number of a header: octal digits, or the bytes of one that is too large for them."""
    if field[0] & 0x80:
        if field[0] != 0x80 or (number := int.from_bytes(field[1:], "big")) > _MOST_SIZE:
            raise BadHeader("a negative or impossible size", place)
        return number
    digits = field.partition(b"\0")[0].strip()
    if digits and not _octal(digits):
        raise BadHeader("a number that is none", place)
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
    """Return the records of a pax header that give a file's name or size, or say that it is sparse."""
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
    """Return where the content of a sparse file begins, in GNU's old form: after the blocks that go on with its map."""
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
