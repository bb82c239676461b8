"""Folders on a local disk, and error messages that list what lies near a missing one."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from ssmpretrain.base.errors import NotAFolder, PathMissing


def find_folder(folder: str, *, where: str) -> Path:
    """Return the path of a folder that must exist.

    Args:
        folder: Path of the folder; "~" stands for the home folder.
        where: Name of the class or command, which opens every message.

    Raises:
        FileNotFoundError: If the folder does not exist. The message names the nearest existing parent and its content.
        NotADirectoryError: If the path is a file.
    """
    path = Path(folder).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise NotAFolder(f"{where}: is a folder; got the file {path}. Give the folder that holds it.")
    raise PathMissing(f"{where}: no folder {path}; {look_around(path)}. Correct the path.")


def look_around(path: Path) -> str:
    """Return a clause that says what the nearest existing folder above a missing path holds."""
    folder = path.parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    shown = folder.absolute()
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        return f"the folder {shown} cannot be read ({error.strerror})"
    files = Counter("".join(Path(entry.name).suffixes[-2:]) or "no suffix" for entry in entries if _is(entry.is_file))
    folders = sum(_is(entry.is_dir) for entry in entries)
    holds = [f"{count} {suffix}" for suffix, count in files.most_common(3)]
    if folders:
        holds.append(f"{folders} folder{'s' * (folders > 1)}")
    if not holds:
        return f"the folder {shown} is empty"
    lead = "the folder" if folder == path.parent else "the nearest folder that exists,"
    return f"{lead} {shown}{',' * (folder != path.parent)} holds {', '.join(holds)}"


def _is(question: Callable[[], bool]) -> bool:
    """Return the answer to a question about a file; False for a link that leads to itself."""
    try:
        return question()
    except OSError:
        return False
