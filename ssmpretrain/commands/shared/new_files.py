"""Checks that a command can write its output file, made before hours of work."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.whole_files import naming


def check_new(name: str, suffixes: Sequence[str], *, where: str) -> Path:
    """Return the path of a file to write. Make its folder, and check that it is writable.

    Args:
        name: The path that the user gave; `~` stands for the home folder.
        suffixes: The suffixes that the file may have.
        where: Start of error messages, such as the name of a command.

    Raises:
        UserError: If the path has another suffix, or exists.
        OSError: If the folder cannot be made or written to.
    """
    path = Path(name).expanduser()
    if path.suffix not in suffixes:
        raise UserError(
            f"{where}: the file ends in {' or '.join(suffixes)}; got {name}. Name it {path.stem}{suffixes[0]}, say."
        )
    if path.exists():
        raise UserError(f"{where}: {name} exists, and nothing is overwritten. Remove it or choose another name.")
    prepare_folder(path)
    return path


def prepare_folder(path: Path) -> None:
    """Make the folder of a file, and check that it is writable.

    Raises:
        OSError: If the folder cannot be made or written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path.parent), tempfile.TemporaryFile(dir=path.parent):
        pass
