"""Files that a command writes, whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.whole_files import naming


def check_new(name: str, suffixes: Sequence[str], *, where: str) -> Path:
    """The path of a file to write, whose folder now exists and can be written to.

    Raises:
        ValueError: If it has another suffix, or is there already.
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
    """Make the folder of a file, and prove that it can be written to.

    Raises:
        OSError: If the folder cannot be made or written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path.parent), tempfile.TemporaryFile(dir=path.parent):
        pass


@contextmanager
def moved_into_place(path: Path) -> Iterator[Path]:
    """A new file beside `path` to write to; it takes that place at the end, and is removed after an error.

    Its name cannot be foreseen: in a folder that others may write to, no link of theirs waits there.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        partial.touch(exist_ok=False)
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write plain data as JSON, whole or not at all."""
    with moved_into_place(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")
