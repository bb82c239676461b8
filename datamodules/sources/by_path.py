"""The source of the images at a path: an image folder, or shards."""

from collections.abc import Sequence
from pathlib import Path

from ssmpretrain.datamodules.sources.folder_source import FolderSource
from ssmpretrain.datamodules.sources.image_source import ImageSource
from ssmpretrain.datamodules.sources.shard_source import ShardSource


def is_image_folder(paths: Sequence[str]) -> bool:
    """Return whether the paths are one folder without shards."""
    folder = Path(paths[0]).expanduser()
    return len(paths) == 1 and folder.is_dir() and not any(folder.glob("*.tar"))


def open_source(paths: Sequence[str], where: str, *, max_bad_fraction: float) -> ImageSource:
    """Find the images at a path, and check them.

    Args:
        paths: An image folder with a sub-folder per class, or shards as `ImageShards` takes them.
        where: Opens every message.
        max_bad_fraction: As in `ShardSource`.

    Raises:
        FileNotFoundError: If there is nothing.
        DataError: If there are no images, or too many are lost.
    """
    if is_image_folder(paths):
        return FolderSource(paths[0], where)
    return ShardSource(list(paths), where, cache=None, max_bad_fraction=max_bad_fraction, labels_of_folder={})
