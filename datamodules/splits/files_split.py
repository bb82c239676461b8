"""Images that a person names one by one: files, folders and patterns, in the given order."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules.decoding.named_images import find_named_images
from ssmpretrain.datamodules.files.image_files import IMAGE_EXTENSIONS, ImageFiles
from ssmpretrain.datamodules.splits.folder_split import FolderBatches, FolderSplit
from ssmpretrain.datamodules.tar.sample import RawSample

_ALL = 2**62


class FilesSplit(FolderSplit):
    """Image files without classes. The key of an image is its path relative to the folder that holds all of them.

    Args:
        names: Image files, folders with images at any depth, and glob patterns. A file that is named twice counts once.
        where: Name of the data module and split, which opens every message.

    Raises:
        FileNotFoundError: If a path does not exist.
        DataError: If a folder holds no image, or a pattern matches no file.
    """

    def __init__(self, names: Sequence[str], where: str) -> None:
        words = [word for name in names for word in _matches(name, where)]
        paths = list(dict.fromkeys(path.absolute() for path in find_named_images(words, _ALL, where=where)))
        folder = Path(os.path.commonpath([path.parent for path in paths]))
        relative = [path.relative_to(folder).as_posix() for path in paths]
        self.files = ImageFiles(folder, relative, [], {}, follow_links=True)

    def batches(self, *, limit: int | None, **options: object) -> FolderBatches:
        """Return the images in batches; see `ImageSplit.batches`."""
        return _FileBatches(self.files, self.labels[0], limit=limit, **options)


class _FileBatches(FolderBatches):
    """Batches of named files. A file counts as an image whatever its suffix is, because a person named it."""

    def read(self, shard: int, sample: int) -> RawSample:
        raw = super().read(shard, sample)
        (suffix,) = (field for field in raw if field != "__key__")
        return raw if suffix in IMAGE_EXTENSIONS else {"__key__": raw["__key__"], "jpg": raw[suffix]}


def _matches(name: str, where: str) -> list[str]:
    """Return the paths that a pattern matches, sorted; or the name itself if it is no pattern, or a path exists."""
    text = os.path.expanduser(name)
    if os.path.lexists(text) or not glob.has_magic(text):
        return [text]
    if found := sorted(glob.glob(text, recursive=True)):
        return found
    raise DataError(f"{where}: no file matches {name}. Correct the pattern.")
