"""Distributions in a temporary folder: what `importlib.metadata` sees of an installed package."""

import importlib
from pathlib import Path


def install(folder: Path, package: str, group: str, entry_points: str) -> None:
    """Install a package without modules in a folder of the import path.

    Args:
        folder: The folder.
        package: Name of the package.
        group: Group of its entry points.
        entry_points: One `name = value` a line.
    """
    info = folder / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{entry_points}\n")
    importlib.invalidate_caches()
