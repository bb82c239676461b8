"""Choice of the split for images at a path: an image folder or shards."""

from collections.abc import Sequence
from pathlib import Path

from ssmpretrain.datamodules.splits.folder_split import FolderSplit
from ssmpretrain.datamodules.splits.image_split import ImageSplit
from ssmpretrain.datamodules.splits.shard_split import ShardSplit


def is_image_folder(paths: Sequence[str]) -> bool:
    """Return whether the paths name a single folder that holds no shards."""
    folder = Path(paths[0]).expanduser()
    return len(paths) == 1 and folder.is_dir() and not any(folder.glob("*.tar"))


def open_split(paths: Sequence[str], where: str, *, max_bad_fraction: float) -> ImageSplit:
    """Find and check the images at a path.

    Args:
        paths: An image folder with one sub-folder per class, or shards as in `ImageShards`.
        where: Name of the data module and split, which opens every message.
        max_bad_fraction: Fraction of the samples that may be lost, as in `ShardSplit`.

    Raises:
        FileNotFoundError: If the path does not exist.
        DataError: If there are no images, or too many are lost.
    """
    if is_image_folder(paths):
        return FolderSplit(paths[0], where)
    return ShardSplit(list(paths), where, cache=None, max_bad_fraction=max_bad_fraction, labels_of_folder={})
