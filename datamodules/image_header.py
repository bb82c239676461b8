"""How large an encoded image says it is, read from its first bytes: known before anything is decoded."""

import re
import struct

_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # JPEG: start of a frame, of whatever kind
_BARE = frozenset({0x01, *range(0xD0, 0xD9)})  # JPEG: markers without a length


def pixel_size(encoded: bytes) -> tuple[int, int]:
    """(width, height) of a JPEG, PNG or WebP image, in pixels.

    Raises:
        ValueError: If it is none of these, or its header is cut off; says what it is as far as can be told.
    """
    if encoded[:3] == b"\xff\xd8\xff":
        return _jpeg(encoded)
    if encoded[:8] == b"\x89PNG\r\n\x1a\n" and encoded[12:16] == b"IHDR" and len(encoded) >= 24:
        width, height = struct.unpack(">II", encoded[16:24])
        return width, height
    if encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP" and len(encoded) >= 30:
        return _webp(encoded)
    raise ValueError(f"not a JPEG, PNG or WebP image but {_kind(encoded)}")


def _jpeg(encoded: bytes) -> tuple[int, int]:
    place = 2
    while place + 9 <= len(encoded):
        if encoded[place] != 0xFF:
            break
        marker = encoded[place + 1]
        if marker == 0xFF:  # filling
            place += 1
        elif marker in _BARE:
            place += 2
        elif marker in _FRAMES:
            height, width = struct.unpack(">HH", encoded[place + 5 : place + 9])
            return width, height
        else:
            place += 2 + int.from_bytes(encoded[place + 2 : place + 4], "big")
    raise ValueError("a JPEG image without a frame header")


def _webp(encoded: bytes) -> tuple[int, int]:
    kind = encoded[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(encoded[24:27], "little"), 1 + int.from_bytes(encoded[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(encoded[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
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
