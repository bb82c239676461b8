"""Flaws of an index file: values that cannot be true of a tar file, and damage after it was written."""

import json
import re
import zlib
from itertools import pairwise
from typing import Any, TypeGuard

from ssmpretrain.datamodules.tar.headers import BLOCK

_SHA256 = re.compile(r"(?:[0-9a-f]{64})?").fullmatch
_MOST = 1 << 62  # of bytes, and so of all that is counted


def find_flaw(content: Any) -> str:
    """Return a phrase that describes the first flaw in the fields of `contents_of`; empty if there is none."""
    if not isinstance(content, dict):
        return "is no index"
    for name in ("samples", "bytes"):
        if not is_count(content.get(name), _MOST):
            return f"says {_shown(content.get(name))} for {name}, which is a number of at least 0"
    extensions, most = content.get("extensions"), content["bytes"] // BLOCK
    if not isinstance(extensions, dict) or not all(is_count(count, most) for count in extensions.values()):
        return "does not say how many files of each extension there are, or says more than there can be"
    files = sum(extensions.values())
    if not (content["samples"] <= files <= most) or (files and not content["samples"]):
        return f"says {content['samples']:,} samples of {files:,} files in {content['bytes']:,} bytes, which cannot be"
    sha256 = content.get("sha256")
    return "" if isinstance(sha256, str) and _SHA256(sha256) else "has no checksum in hexadecimal"


def find_layout_flaw(content: dict[str, Any]) -> str:
    """Return a phrase that describes the first flaw in the places of the samples; empty if there is none."""
    samples, offsets, crc32 = content["samples"], content.get("offsets"), content.get("crc32")
    repeated = content.get("repeated", [])
    if not _are_counts(offsets, samples, content["bytes"] - BLOCK):
        return f"does not say where each of its {samples:,} samples lies in the file"
    if any(start % BLOCK or stop <= start for start, stop in pairwise([*offsets, content["bytes"] // BLOCK * BLOCK])):
        return "says that samples lie where none can"
    if crc32 is not None and not _are_counts(crc32, samples, (1 << 32) - 1):
        return f"does not have a checksum of each of its {samples:,} samples"
    if not isinstance(repeated, list) or not _are_counts(repeated, len(repeated), samples - 1):
        return "says that samples are repeated which it does not have"
    if "check" in content and content["check"] != checksum_of_index(content):
        return "is damaged: its own checksum is another"
    return ""


def checksum_of_index(content: dict[str, Any]) -> int:
    """Return the checksum of the content of an index file; it does not depend on the layout of the JSON text."""
    said = {name: value for name, value in content.items() if name != "check"}
    return zlib.crc32(json.dumps(said).encode())


def is_count(number: Any, most: int) -> bool:
    """Return whether `number` is an int from 0 to `most`; True and 1.0 are not."""
    return type(number) is int and 0 <= number <= most


def _are_counts(numbers: Any, length: int, most: int) -> TypeGuard[list[int]]:
    return isinstance(numbers, list) and len(numbers) == length and all(is_count(number, most) for number in numbers)


def _shown(value: Any) -> str:
    return f"a {type(value).__name__}" if isinstance(value, list | dict) else f"{value!r:.40}"
