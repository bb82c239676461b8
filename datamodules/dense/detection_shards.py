"""Data module for images with objects in webdataset tars."""

from collections.abc import Sequence
from typing import Any

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules.dense.detection_data import DetectionData
from ssmpretrain.datamodules.labels.classes import Labels
from ssmpretrain.datamodules.shards.classes_beside import classes_beside
from ssmpretrain.datamodules.splits.shard_source import ShardSource
from ssmpretrain.datamodules.splits.shard_split import ShardSplit
from ssmpretrain.datamodules.tar.index import ShardIndex


class DetectionShards(DetectionData):
    """Images with objects from webdataset tar files: one image (jpg, jpeg, png, webp) and one `json` per sample.

    The `json` has the height and width of the image and a list of objects: category (0 to K - 1), bbox (x, y, width,
    height in pixels), area, iscrowd, and for masks segmentation (COCO's compressed run-length code). The `classes.json`
    beside the shards names the classes. If shards lie beside different lists, the numbers are translated by the names
    to the first list of `train`. `shards pack --annotations` writes this form. Plan, resume, bad samples and servers
    work as in `ImageShards`.

    Evaluation counts every object. In training, an object whose area is 0 or less, whose mask has no pixel, or whose
    box is narrower or lower than 1 pixel or lies outside of the image is left out and counted, once its image is read.

    Args:
        train: Tar files, as in `ImageShards`.
        val: Tar files for validation, in the same forms; None for no validation.
        shuffle_buffer: As in `ImageShards`.
        cache: As in `ImageShards`.
        cache_limit: As in `ImageShards`.
        storage_options: As in `ImageShards`.
        **kwargs: Arguments of `DetectionData`.

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
        return _ObjectSplit(**self._source.arguments(pattern, split, self.max_bad_fraction))


class _ObjectSplit(ShardSplit):
    """Shards with objects.

    Args:
        where: Name of the data module and split, which opens every message.
        **arguments: Arguments of `ShardSplit`.

    Raises:
        DataError: As `ShardSplit`, and if a shard holds no annotation.
    """

    def __init__(self, *, where: str, **arguments: Any) -> None:
        super().__init__(where=where, **arguments)
        without = [index for index in self.indexes if index.extensions and "json" not in index.extensions]
        if without:
            found = ", ".join(f".{extension}" for extension in sorted(without[0].extensions)[:8])
            raise DataError(
                f"{where}: no annotation (.json) in {len(without):,} of {len(self.indexes):,} shards; "
                f"{without[0].path} holds {found}. Pack images with their objects by `ssmpretrain shards pack "
                "--annotations`, or leave out such shards."
            )

    def _labels_in(self, folder: str, shards: Sequence[ShardIndex]) -> Labels:
        """Return the classes of the objects of the shards in one folder."""
        return Labels(classes_beside(shards[0].path))
