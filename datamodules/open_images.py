"""Choice of the data module for images at a path: an image folder or shards."""

from collections.abc import Sequence
from typing import Any

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules.image_data import ImageData
from ssmpretrain.datamodules.image_folder import ImageFolder
from ssmpretrain.datamodules.image_shards import ImageShards
from ssmpretrain.datamodules.image_text_shards import ImageTextShards
from ssmpretrain.datamodules.splits.by_path import is_image_folder


def open_images(
    train: str | Sequence[str], val: str | Sequence[str], *, caption: list[str] | None = None, **options: Any
) -> ImageData:
    """Return the data module that reads an image folder with one sub-folder per class, or shards.

    Args:
        train: Training images: a folder, or shards as in `ImageShards`.
        val: Validation images of the same kind.
        caption: Members of the shards that hold captions, as in `ImageTextShards`; None reads only images and labels.
        **options: Arguments of `ImageData`.

    Raises:
        DataError: If one is a folder and the other shards, or if captions of a folder are requested.
    """
    paths = [[split] if isinstance(split, str) else list(split) for split in (train, val)]
    kinds = {is_image_folder(split) for split in paths}
    if len(kinds) > 1:
        raise DataError(
            "images: training and validation images are both image folders or both shards; got "
            f"{' '.join(paths[0])} and {' '.join(paths[1])}. Pack the folder with `ssmpretrain shards pack`, say."
        )
    if kinds == {True} and caption is not None:
        raise DataError(f"images: captions are in shards; got the folder {paths[1][0]}. Pack it with `shards pack`.")
    if kinds == {True}:
        return ImageFolder(paths[0][0], paths[1][0], **options)
    if caption is not None:
        return ImageTextShards(paths[0], paths[1], caption=caption, **options)
    return ImageShards(paths[0], paths[1], **options)
