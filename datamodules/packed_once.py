"""A folder of shards that is made on first use and is whole or absent, whoever else makes it at the same time."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ssmpretrain.datamodules.errors import DataError

_ABANDONED_AFTER = 24 * 3600.0  # seconds; packing takes a minute


def pack_once(folder: Path, pack: Callable[[Path], None], where: str) -> None:
    """Make `folder` unless it is there.

    Args:
        folder: What to make, in the cache folder.
        pack: Writes its files into the folder it is given.
        where: Named in the errors.

    Raises:
        DataError: If the cache folder cannot be written.
    """
    if folder.is_dir():
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise DataError(
            f"{where}: the cache folder {folder.parent} cannot be written ({error.strerror}). "
            "Set SSMPRETRAIN_CACHE to a folder that can."
        ) from error
    try:
        pack(partial)
        partial.chmod(0o755)
        os.rename(partial, folder)
    except OSError as error:
        if not folder.is_dir():  # else another process packed the same meanwhile
            raise DataError(
                f"{where}: packing into the cache folder {folder.parent} failed ({error.strerror}). "
                "Make room, or set SSMPRETRAIN_CACHE to another folder."
            ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove what processes that were killed left of it."""
    for partial in folder.parent.glob(f".{folder.name}-*"):
        try:
            if time.time() - partial.lstat().st_mtime > _ABANDONED_AFTER:
                shutil.rmtree(partial, ignore_errors=True)
        except FileNotFoundError:
            pass  # another process has moved it into place
