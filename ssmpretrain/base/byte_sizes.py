"""Sizes in bytes, as people write and read them."""

import re

from ssmpretrain.base.errors import DataError

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str) -> int:
    """Return the number of bytes of a size with an optional unit: "500M" -> 524288000.

    Raises:
        DataError: If the text is not a positive size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    size = int(float(match.group(1)) * _UNITS[match.group(2).upper()]) if match else 0
    if size < 1:
        raise DataError(f"a size is a positive number with K, M, G or T; got {text!r}. Use 1G, say.")
    return size


def show_size(size: float) -> str:
    """Return a size with the unit that keeps the number short: 524288000 -> "500 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
