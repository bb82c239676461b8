"""Files that are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".{}.partial"


def partial(path: Path) -> Path:
    """Where a file lies while it is written; hidden, and in the same file system."""
    return path.with_name(PARTIAL.format(path.name))


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems cannot, and the file itself is safe
    finally:
        os.close(descriptor)


def write_synced(path: Path, text: str) -> None:
    """Write `text` to the disk itself, in place."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Make `text` the content of a file: at every moment it has the old content or the new.

    Raises:
        OSError: If that fails; its `filename` is `path`, whose content is the old one.
    """
    with naming(path):
        try:
            write_synced(partial(path), text)
            partial(path).replace(path)
        except OSError:
            partial(path).unlink(missing_ok=True)
            raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an error of the system within the block the name of the file; writing to a full disk has none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
