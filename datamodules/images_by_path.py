"""Data module for images that a person names on a command line: a folder, files, patterns or shards."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules.faults.bad_samples import BadSamples
from ssmpretrain.datamodules.image_data import ImageData
from ssmpretrain.datamodules.order.trial import try_some
from ssmpretrain.datamodules.splits.by_path import is_image_folder
from ssmpretrain.datamodules.splits.files_split import FilesSplit
from ssmpretrain.datamodules.splits.folder_split import FolderSplit
from ssmpretrain.datamodules.splits.image_split import ImageSplit
from ssmpretrain.datamodules.splits.shard_source import ShardSource
from ssmpretrain.datamodules.splits.shard_split import ShardSplit

_BUFFER = 5000  # of training, which reads no named images


class NamedImages(ImageData):
    """Images with or without labels, read as in evaluation; `val_dataloader` gives them.

    The first sub-folders of a single folder are the classes, as in `ImageFolder`. Shards are labelled as in
    `ImageShards`. Image files, patterns, and several folders have no labels.

    Args:
        paths: A folder of images at any depth; image files, folders and glob patterns; or shards as in `ImageShards`.
        where: Name of the command, which opens every message.
        **options: Arguments of `ImageData`.

    Raises:
        DataError: If some paths name shards and others do not; in `setup`, if there is no usable image.
        FileNotFoundError: In `setup`, if a path does not exist.
    """

    def __init__(self, paths: Sequence[str], where: str, **options: Any) -> None:
        self._name = where
        self.val = list(paths)
        super().__init__(**options)
        kinds = {_names_shards(path) for path in self.val}
        if len(kinds) != 1:
            raise DataError(
                f"{where}: images are all in shards, or all in files and folders; got {' '.join(self.val)[:200]}. "
                "Pack the files with `ssmpretrain shards pack`, say."
            )
        self._in_shards = kinds == {True}

    @property
    def _where(self) -> str:
        return self._name

    def _open(self, split: str) -> ImageSplit:
        if self._in_shards:
            source = ShardSource(self._where, _BUFFER, None, None, None)
            return ShardSplit(**{**source.arguments(self.val, split, self.max_bad_fraction), "where": self._where})
        if is_image_folder(self.val):
            return FolderSplit(self.val[0], self._where)
        return FilesSplit(self.val, self._where)

    def _bad_of(self, use: str) -> BadSamples:
        if use not in self._bad:
            self._bad[use] = BadSamples(self._where, self.max_bad_fraction)
        return self._bad[use]

    def _try_some(self, split: str) -> None:
        try_some(self._batches(split, train=False, limit=None), self._where, "images", self._labels)

    def identity(self, key: str) -> str:
        """Return a text that is equal for two keys of the same file, also of different data modules.

        For an image in a shard this is the key alone.
        """
        images = self._images("val")
        return os.path.realpath(images.files.folder / key) if isinstance(images, FolderSplit) else key

    def class_of(self, identity: str) -> str | None:
        """Return the class of a file by its `identity`, if it lies in a class folder of these images."""
        images = self._images("val")
        if not isinstance(images, FolderSplit):
            return None
        path = os.path.relpath(identity, os.path.realpath(images.files.folder))
        name = images.files.class_of(path)
        return name if name in images.files.classes else None


def _names_shards(path: str) -> bool:
    """Return whether a path is one of shards: a tar file or pattern, a URL, or a folder that holds tar files."""
    folder = Path(path).expanduser()
    return path.endswith(".tar") or "://" in path or (folder.is_dir() and any(folder.glob("*.tar")))
