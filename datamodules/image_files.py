"""The images in a folder, and the classes that its sub-folders name."""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ssmpretrain.datamodules.errors import DataError
from ssmpretrain.datamodules.paths import find_folder
from ssmpretrain.datamodules.shard_index import IMAGE_EXTENSIONS


@dataclass(frozen=True)
class ImageFiles:
    """Images below a folder, in sorted order.

    Args:
        folder: Where they were found.
        paths: Relative to the folder, with "/".
        classes: Names of the first-level sub-folders that hold images, sorted; empty if all lie in the folder itself.
    """

    folder: Path
    paths: list[str]
    classes: list[str]

    def class_of(self, path: str) -> str | None:
        """The class that a path names, or None for an image in the folder itself."""
        first, separator, _ = path.partition("/")
        return first if separator else None


def find_images(folder: str | Path, *, where: str) -> ImageFiles:
    """Find the images (jpg, jpeg, png, webp) in a folder and all folders below it; hidden ones are passed over.

    Args:
        folder: Where to look; links are followed.
        where: Opens every message.

    Raises:
        FileNotFoundError: If there is no such folder.
        DataError: If no image is in it; says what is.
    """
    root = find_folder(str(folder), where=where)
    paths: list[str] = []
    others: Counter[str] = Counter()
    for current, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = Path(current).relative_to(root)
        for name in files:
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            if suffix[1:] in IMAGE_EXTENSIONS:
                paths.append((relative / name).as_posix())
            else:
                others[suffix or "no suffix"] += 1
    if not paths:
        holds = ", ".join(f"{count:,} {suffix}" for suffix, count in others.most_common(3)) or "no files"
        raise DataError(
            f"{where}: no image ({', '.join(IMAGE_EXTENSIONS)}) in {root}, which holds {holds}. Give another folder."
        )
    paths.sort()
    classes = sorted({path.partition("/")[0] for path in paths if "/" in path})
    return ImageFiles(root, paths, classes)
