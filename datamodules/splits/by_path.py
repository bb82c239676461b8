"""The images at a path: of an image folder, or of shards."""

from collections.abc import Sequence
from pathlib import Path

from ssmpretrain.datamodules.splits.folder_split import FolderSplit
from ssmpretrain.datamodules.splits.image_split import ImageSplit
from ssmpretrain.datamodules.splits.shard_split import ShardSplit


def is_image_folder(paths: Sequence[str]) -> bool:
    """Return whether the paths are one folder without shards."""
    folder = Path(paths[0]).expanduser()
    return len(paths) == 1 and folder.is_dir() and not any(folder.glob("*.tar"))


def open_split(paths: Sequence[str], where: str, *, max_bad_fraction: float) -> ImageSplit:
    """Find the images at a path, and check them.

    Args:
        paths: An image folder with a sub-folder per class, or shards as `ImageShards` takes them.
        where: Opens every message.
        max_bad_fraction: As in `ShardSplit`.

    Raises:
        FileNotFoundError: If there is nothing.
        DataError: If there are no images, or too many are lost.
    """
    if is_image_folder(paths):
        return FolderSplit(paths[0], where)
    return ShardSplit(list(paths), where, cache=None, max_bad_fraction=max_bad_fraction, labels_of_folder={})
