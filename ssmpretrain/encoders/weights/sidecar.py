"""The checksum beside a checkpoint, in `NAME.sha256`, and whether the file is still what that says.

It has the form that `sha256sum -c` reads; its first line, a comment, is the size.
"""

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

_LONGEST = 1000  # bytes
_FORM = re.compile(r"(?:# (\d+) bytes\n)?([0-9a-f]{64}) [ *](.+)\n?")


class Said(NamedTuple):
    """What a sidecar says of its file: size in bytes (None where it does not say), checksum, and first name."""

    size: int | None
    sha256: str
    name: str


def sidecar(path: Path) -> Path:
    """Where the checksum of a checkpoint file lies."""
    return path.with_name(path.name + ".sha256")


def sidecar_text(path: Path, size: int, sha256: str) -> str:
    """What the sidecar of a file of `size` bytes says."""
    return f"# {size} bytes\n{sha256}  {path.name}\n"


def said_beside(path: Path) -> Said | None:
    """What the sidecar says, if it is there, a regular file and whole."""
    beside = sidecar(path.resolve())
    try:
        if not beside.is_file():  # a pipe is not waited for
            return None
        with beside.open("rb") as file:
            match = _FORM.fullmatch(file.read(_LONGEST).decode())
    except (OSError, UnicodeDecodeError):
        return None
    return Said(int(match[1]) if match[1] else None, match[2], match[3]) if match else None


def contradiction(path: Path) -> str | None:
    """In what a file is not what its sidecar says; None where they agree, or there is no sidecar."""
    path = path.resolve()  # a run that goes on moves its last.ckpt
    said = said_beside(path)
    if said is None:
        return None
    state = path.stat()
    if said.size is not None and state.st_size < said.size:
        return f"short: {state.st_size:,} of {said.size:,} bytes"
    if said.size is not None and state.st_size > said.size:
        return f"long: {state.st_size:,} bytes instead of {said.size:,}"
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != said.sha256:
        return "its checksum differs from the one in its .sha256"
    return None
