"""Header of an encoded image: its size and its number of scans, read without decoding it."""

import re
import struct
from collections.abc import Iterator

_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # JPEG: start of a frame, of whatever kind
_END, _SCAN = 0xD9, 0xDA
# A marker of JPEG that has a length. Like libjpeg, the pattern skips everything that may lie before a marker: stray
# bytes, filling (FF FF), stuffing (FF 00), the entropy-coded data of a scan and the markers in it.
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])", re.DOTALL)
_MOST_SEGMENTS = 1 << 16
_USUAL_SCANS = 16


def pixel_size(encoded: bytes) -> tuple[int, int]:
    """Return (width, height) of a JPEG, PNG or WebP image, in pixels.

    Raises:
        ValueError: If the bytes are none of these, or the header is cut off. The message names the format, if known.
    """
    if encoded[:3] == b"\xff\xd8\xff":
        return _jpeg(encoded)
    if encoded[:8] == b"\x89PNG\r\n\x1a\n" and encoded[12:16] == b"IHDR" and len(encoded) >= 24:
        width, height = struct.unpack(">II", encoded[16:24])
        return width, height
    if encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP" and len(encoded) >= 25:
        return _webp(encoded)
    raise ValueError(f"not a JPEG, PNG or WebP image but {_kind(encoded)}")


def num_scans(encoded: bytes) -> int:
    """Return how often a decoder passes over an image: the number of scans of a JPEG, and 1 for other formats.

    A progressive JPEG has about ten scans.

    Raises:
        ValueError: If a JPEG has more segments than any camera or program writes.
    """
    if encoded[:3] != b"\xff\xd8\xff":
        return 1
    marks = encoded.count(b"\xff\xda")  # scans, also of a thumbnail, and other data that look like one
    return marks if marks <= _USUAL_SCANS else sum(marker == _SCAN for marker, _ in _segments(encoded))


def _segments(encoded: bytes) -> Iterator[tuple[int, int]]:
    """Yield (marker, place of the length field) for each segment of a JPEG image, up to the end of the image."""
    place = 2
    for _ in range(_MOST_SEGMENTS):
        found = _MARKER.search(encoded, place)
        if found is None or (marker := found[1][0]) == _END:
            return
        yield marker, found.end()
        place = found.end() + max(2, int.from_bytes(encoded[found.end() : found.end() + 2], "big"))
    raise ValueError(f"a JPEG image of more than {_MOST_SEGMENTS:,} segments")


def _jpeg(encoded: bytes) -> tuple[int, int]:
    for marker, place in _segments(encoded):
        if marker in _FRAMES and place + 7 <= len(encoded):
            height, width = struct.unpack(">HH", encoded[place + 3 : place + 7])
            return width, height
        if marker == _SCAN:
            break
    raise ValueError("a JPEG image without a frame header")


def _webp(encoded: bytes) -> tuple[int, int]:
    kind = encoded[12:16]
    if kind == b"VP8X" and len(encoded) >= 30:
        return 1 + int.from_bytes(encoded[24:27], "little"), 1 + int.from_bytes(encoded[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(encoded[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and len(encoded) >= 30:
        width, height = struct.unpack("<HH", encoded[26:30])
        return width & 0x3FFF, height & 0x3FFF
    raise ValueError("a WebP image without a frame header")


def _kind(encoded: bytes) -> str:
    if not encoded:
        return "0 bytes"
    if encoded.lstrip()[:1] == b"<":
        return "a web page"
    if encoded[:4] == b"GIF8":
        return "a GIF"
    if encoded[4:12] in (b"ftypavif", b"ftypheic", b"ftypmif1"):
        return "AVIF or HEIC"
    opening = re.sub(r"[^ -~]", ".", encoded[:12].decode("latin-1"))
    return f"{len(encoded):,} bytes that begin with {opening!r}"
