"""Folder of shards that is packed on first use: complete or absent, even if several processes pack it at once."""

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules.files.local_files import MOST_INDEX, read_within
from ssmpretrain.datamodules.shards.folder_index import NAME, parse_folder_index
from ssmpretrain.datamodules.tar.index import index_path, read_index

_log = logging.getLogger(__name__)

_ABANDONED_AFTER = 24 * 3600.0  # seconds after which a partial folder is removed; packing takes a minute


def pack_once(folder: Path, pack: Callable[[Path], None], where: str) -> None:
    """Create `folder` unless it exists; create it again if the size or the index of one of its shards is wrong.

    Args:
        folder: Folder to create, inside the cache folder.
        pack: Writes the files of the folder into the folder that it is given.
        where: Name of the data module, which opens every message.

    Raises:
        DataError: If the cache folder cannot be written.
    """
    if _is_whole(folder):
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        damaged = partial.with_name(f"{partial.name}-damaged")
    except OSError as error:
        raise DataError(
            f"{where}: the cache folder {folder.parent} cannot be written ({error.strerror}). "
            "Set SSMPRETRAIN_CACHE to a folder that can."
        ) from error
    try:
        pack(partial)
        partial.chmod(0o755)
        if folder.is_dir() and not _is_whole(folder):
            _log.warning("%s: the shards in %s have changed since packing; they are packed again.", where, folder)
            os.rename(folder, damaged)
        os.rename(partial, folder)
    except OSError as error:
        if not _is_whole(folder):  # else another process packed the same meanwhile
            raise DataError(
                f"{where}: packing into the cache folder {folder.parent} failed ({error.strerror}). "
                "Make room, or set SSMPRETRAIN_CACHE to another folder."
            ) from error
    finally:
        for rest in (partial, damaged):
            shutil.rmtree(rest, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove partial folders that killed processes left."""
    for partial in folder.parent.glob(f".{folder.name}-*"):
        try:
            if time.time() - partial.lstat().st_mtime > _ABANDONED_AFTER:
                shutil.rmtree(partial, ignore_errors=True)
        except FileNotFoundError:
            pass  # another process has moved it into place


def _is_whole(folder: Path) -> bool:
    """Return whether the folder exists, with all shards that its index names, and with the right sizes."""
    try:
        shards = [folder / name for name in parse_folder_index(read_within(folder / NAME, MOST_INDEX), folder) or ()]
        return bool(shards) and all(read_index(index_path(path))[0].bytes == path.stat().st_size for path in shards)
    except (OSError, DataError):
        return False
