"""Data module for images with class maps in webdataset tars."""

from collections.abc import Sequence
from typing import Any

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules.dense.segmentation_data import SegmentationData
from ssmpretrain.datamodules.labels.classes import CLASSES_FILE, Classes, Labels
from ssmpretrain.datamodules.shards.classes_beside import classes_beside
from ssmpretrain.datamodules.splits.shard_source import ShardSource
from ssmpretrain.datamodules.splits.shard_split import ShardSplit
from ssmpretrain.datamodules.tar.index import ShardIndex
from ssmpretrain.datamodules.targets.class_map import CLASS_MAP


class SegmentationShards(SegmentationData):
    """Images with class maps from webdataset tar files: one image (jpg, jpeg, png, webp) and one `seg.png` per sample.

    `seg.png` has one number per pixel, 0 to K - 1, or 255 for a pixel to ignore: a grey PNG, or one with a palette. The
    `classes.json` beside the shards names the classes of the pixels. If shards lie beside different lists, the numbers
    are translated by the names to the first list of `train`. `shards pack` writes this form. Plan, resume, bad
    samples and servers work as in `ImageShards`.

    Args:
        train: Tar files, as in `ImageShards`.
        val: Tar files for validation, in the same forms; None for no validation.
        shuffle_buffer: As in `ImageShards`.
        cache: As in `ImageShards`.
        cache_limit: As in `ImageShards`.
        storage_options: As in `ImageShards`.
        **kwargs: Arguments of `SegmentationData`.

    Raises:
        DataError: If an argument is out of range; in `setup`, if too many samples are lost, the classes are not known,
            or images are too few.
        FileNotFoundError: In `setup`, if shards are missing.
    """

    def __init__(
        self,
        train: str | list[str],
        val: str | list[str] | None = None,
        *,
        shuffle_buffer: int = 5000,
        cache: str | None = None,
        cache_limit: str | None = None,
        storage_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._source = ShardSource(type(self).__name__, shuffle_buffer, cache, cache_limit, storage_options)
        self.train = train
        self.val = val
        self.shuffle_buffer = shuffle_buffer
        self.cache = cache
        self.cache_limit = cache_limit
        self.storage_options = storage_options

    @property
    def _block(self) -> int:
        return self.shuffle_buffer

    @property
    def _absent(self) -> tuple[type[Exception], ...]:
        return self._source.absent

    def _open(self, split: str) -> ShardSplit:
        pattern = self.train if split == "train" else self.val
        assert pattern is not None, split
        arguments = self._source.arguments(pattern, split, self.max_bad_fraction)
        return _ClassMapSplit(**arguments, is_named=self._own_classes is not None)


class _ClassMapSplit(ShardSplit):
    """Shards with class maps.

    Args:
        is_named: Whether the data module itself names the classes of the pixels.
        **arguments: Arguments of `ShardSplit`.

    Raises:
        DataError: As `ShardSplit`, and if a shard holds no class map.
    """

    def __init__(self, *, where: str, is_named: bool, **arguments: Any) -> None:
        super().__init__(where=where, **arguments)
        self._where, self._is_named = where, is_named
        without = [index for index in self.indexes if index.extensions and CLASS_MAP not in index.extensions]
        if without:
            found = ", ".join(f".{extension}" for extension in sorted(without[0].extensions)[:8])
            raise DataError(
                f"{where}: no class map (.{CLASS_MAP}) in {len(without):,} of {len(self.indexes):,} shards; "
                f"{without[0].path} holds {found}. Pack images with their masks by `ssmpretrain shards pack --masks`, "
                "or leave out such shards."
            )

    def _labels_in(self, folder: str, shards: Sequence[ShardIndex]) -> Labels:
        """Return the classes of the pixels of the shards in one folder."""
        beside = classes_beside(shards[0].path)
        if not beside or not any("cls" in index.extensions for index in shards):
            return Labels(beside)
        if not self._is_named:
            raise DataError(
                f"{self._where}: {CLASSES_FILE} names the classes of pixels; got {beside.source} beside shards that "
                "also have labels (.cls), whose classes it may name instead. Name the classes of the pixels by classes."
            )
        return Labels(Classes((), folder))
