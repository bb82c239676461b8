"""Wording of messages: remedies for errors of the operating system, the nearest known name, and long lists."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Sequence

_MAX_LISTED = 16
# Remedies by the number of the error.
REMEDIES = {
    errno.EACCES: "Choose a folder that you may write to, or change its permissions.",
    errno.EPERM: "Choose a folder that you may write to, or change its permissions.",
    errno.EROFS: "The file system is mounted read-only; choose another folder.",
    errno.ENOSPC: "The disk is full; free some space or choose another folder.",
    errno.EDQUOT: "The quota is used up; free some space or choose another folder.",
    errno.EPIPE: "The program that read the output has ended.",
    errno.ENOENT: "Check the path.",
    errno.ENOTDIR: "A file stands where a folder is needed; choose another path.",
    errno.EEXIST: "A file stands where a folder is needed; choose another path.",
    errno.ENAMETOOLONG: "Choose a shorter path.",
    errno.EIO: "The disk, or the server that it is on, reports a fault; look at it, or choose another folder.",
    errno.ESTALE: "The file server has lost it; mount it again, or choose another folder.",
    errno.EISDIR: "A folder was given where a file is needed.",
}


def remedy(error: OSError) -> str:
    """Return what a person can do about an error of the operating system."""
    return REMEDIES.get(error.errno or 0, "Check the path.")


def nearest(word: str, known: Iterable[str], label: str) -> str:
    """Return `Did you mean 'x'?` for the closest of `known`, or if none is close, `label` and the known words.

    The shortest word that begins with `word` is the closest.
    """
    known = list(dict.fromkeys(known))
    longer = sorted((name for name in known if name.startswith(word)), key=len) if len(word) > 1 else []
    close = longer or difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    more = ", ..." if len(known) > _MAX_LISTED else ""
    return f"Did you mean {close[0]!r}?" if close else f"{label}: {', '.join(known[:_MAX_LISTED])}{more}."


def counted(count: int, noun: str) -> str:
    """Return a number with a regular noun, as "1 image" or "1,200 images"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def few(names: Sequence[str], most: int = 5) -> str:
    """Return the first names in one line, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest:,} more" if rest > 0 else "")
