"""The folder of built libraries: only the user, or root, can have written it and its files."""

import hashlib
import os
import shutil
import stat
import tempfile
import time
import warnings
from pathlib import Path

_ABANDONED_AFTER = 3600.0  # seconds; a build takes a few


def private_folder() -> Path | None:
    """Return the user's own folder in the cache, made if needed; None if it is not safe to load code from."""
    root = os.environ.get("SSMPRETRAIN_CACHE")
    try:
        cache = Path(root) if root else Path.home() / ".cache" / "ssmpretrain"
        folder = cache / f"native-{os.geteuid()}"
        _make(cache, 0o755)
        _make(folder, 0o700)
        if (why := why_unsafe(folder.lstat())) is not None:
            warnings.warn(
                f"ssmpretrain: {folder} {why}, so native CPU kernels are not loaded from it, but built at each start. "
                "Remove it, or set SSMPRETRAIN_CACHE to a folder of your own.",
                stacklevel=2,
            )
            return None
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError):  # RuntimeError: no home folder
        return None
    _sweep(folder)
    return folder


def why_unsafe(state: os.stat_result) -> str | None:
    """Return the reason why others may have written a file or folder; None if they cannot have."""
    if not (stat.S_ISDIR(state.st_mode) or stat.S_ISREG(state.st_mode)):
        return "is no folder or file"
    if state.st_uid not in (0, os.geteuid()):
        return f"belongs to user {state.st_uid}"
    return "may be written to by others" if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else None


def keep(built: Path, folder: Path, name: str) -> Path:
    """Move a library into the folder and return its path, which ends in the sha256 of its content."""
    built.chmod(0o700)
    path = folder / f"{name}-{_sha256(built)}.so"
    os.replace(built, path)
    return path


def is_kept(path: Path) -> bool:
    """Return whether `keep` put the file there and nobody else can have written it."""
    try:
        return why_unsafe(path.lstat()) is None and path.stem.endswith(f"-{_sha256(path)}")
    except OSError:
        return False


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _make(folder: Path, most: int) -> None:
    """Make a folder with no more permissions than `most`, for any umask."""
    if not os.path.lexists(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir(most)
        except FileExistsError:
            return  # another process made it meanwhile
        if most == 0o700:
            folder.chmod(most)


def _sweep(folder: Path) -> None:
    """Remove the folders of builds that were killed."""
    for place in folder.glob(".build-*"):
        if time.time() - place.lstat().st_mtime > _ABANDONED_AFTER:
            shutil.rmtree(place, ignore_errors=True)
