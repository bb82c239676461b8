"""Images of one split that lie in shards, and their batches."""

import contextlib
import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ssmpretrain.base import ranks
from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules.decoding.batcher import ImageBatch
from ssmpretrain.datamodules.faults.bad_samples import BadRecord, BadSample
from ssmpretrain.datamodules.files.image_files import IMAGE_EXTENSIONS
from ssmpretrain.datamodules.labels.classes import UNLABELLED, Classes, Labels
from ssmpretrain.datamodules.order.batches import PlannedBatches
from ssmpretrain.datamodules.order.loader import BatchKey
from ssmpretrain.datamodules.order.plan import first_of_each
from ssmpretrain.datamodules.remote.cache import ShardCache
from ssmpretrain.datamodules.shards.classes_beside import classes_beside, folder_of
from ssmpretrain.datamodules.shards.damage import keep_usable
from ssmpretrain.datamodules.shards.describe import load_indexes
from ssmpretrain.datamodules.shards.fetch_ahead import fetch_ahead
from ssmpretrain.datamodules.shards.location import RemoteShard
from ssmpretrain.datamodules.shards.paths import find_shards
from ssmpretrain.datamodules.shards.shard import Shard
from ssmpretrain.datamodules.splits.image_split import ImageSplit
from ssmpretrain.datamodules.tar.index import ShardIndex, describe_several_images
from ssmpretrain.datamodules.tar.sample import RawSample
from ssmpretrain.datamodules.targets.class_map import CLASS_MAP

_log = logging.getLogger(__name__)
_LABELS_READ = 16  # number of samples whose labels are checked before training


class ShardBatches(PlannedBatches):
    """Batches of samples in shards. Each sample is read alone, from its place in the tar.

    Args:
        shards: The shards.
        labels: Label reader of each shard, in the same order.
        limit: Number of samples to read, spread over the shards; None reads all.
        **options: Arguments of `PlannedBatches`.
    """

    def __init__(
        self, shards: Sequence[Shard], labels: Sequence[Labels], *, limit: int | None = None, **options: Any
    ) -> None:
        super().__init__(first_of_each([shard.index.samples for shard in shards], limit), **options)
        self.shards = shards
        self.labels = labels
        self._is_remote = any(isinstance(shard.location, RemoteShard) for shard in shards)
        self._ahead: list[int] = []  # shards that are fetched while others are read

    def __getitem__(self, key: BatchKey) -> ImageBatch | None:
        if self._is_remote:
            self._fetch_ahead(key)
        return super().__getitem__(key)

    def _fetch_ahead(self, key: BatchKey) -> None:
        """Start to fetch the shards that the rank reads after the present ones."""
        reads = len(self.samples(key).shards)
        near = self.order.block if self.order is not None else float(self.sizes.mean())
        later = key._replace(batch=key.batch + math.ceil(near / reads))
        if later.batch < self.num_batches(key.rank, key.epoch, key.stages):
            ahead = np.unique(self.samples(later).shards).tolist()
            if not set(ahead) <= set(self._ahead):
                fetch_ahead(self.shards[shard].location for shard in ahead)
                self._ahead = ahead

    def labels_of(self, shard: int) -> Labels:
        """Return the object that reads the labels of a shard; shards in one folder share it."""
        return self.labels[shard]

    def known_labels(self) -> Iterator[tuple[str, int]]:
        """Yield (text, label) for shards with unlabelled samples in their index, and for a few local samples."""
        for shard in self.shards:
            if number := shard.index.num_unlabelled:
                yield f"{number:,} sample{'s' * (number != 1)} in {shard}", UNLABELLED
        for place, sample in self.spread(_LABELS_READ):
            if not isinstance(self.shards[place].location, RemoteShard):
                with contextlib.suppress(BadSample):  # counted later, when training reads it
                    raw = self.read(place, sample)
                    if not raw.keys().isdisjoint(IMAGE_EXTENSIONS):
                        yield f"{raw['__key__']} in {self.shards[place]}", self.labels_of(place).read(raw)

    def source(self, shard: int) -> tuple[str, int]:
        """Return the path of a shard, and the number of its samples that are read."""
        return str(self.shards[shard]), int(self.sizes[shard])

    def read(self, shard: int, sample: int) -> RawSample:
        """Return the fields of one sample; see `Shard.read_sample`."""
        return self.shards[shard].read_sample(sample)


class ShardSplit(ImageSplit):
    """Shards of one split, found and checked.

    Args:
        pattern: Tar files, as in `find_shards`.
        where: Name of the data module and split, which opens every message.
        cache: Cache for copies of shards on servers; None if all shards are local.
        max_bad_fraction: Fraction of all samples that may be lost in damaged shards.
        labels_of_folder: Label readers of the folders known so far, by folder; those of this split are added.

    Attributes:
        indexes: Index of each usable shard.
        shards: The usable shards, in the same order.

    Raises:
        FileNotFoundError: If shards are missing.
        DataError: If too many samples are lost, or a shard holds no image.
    """

    def __init__(
        self,
        pattern: str | list[str],
        where: str,
        *,
        cache: ShardCache | None,
        max_bad_fraction: float,
        labels_of_folder: dict[str, Labels],
    ) -> None:
        paths = find_shards(pattern, where=where, cache=cache)
        self.indexes, damaged = keep_usable(paths, load_indexes(paths), max_bad_fraction, where)
        _check_images(self.indexes, where)
        self.shards = [Shard(index) for index in self.indexes]
        # If the number of lost samples is known, they stay in the plan, and each is counted when it is read.
        self.faults = [
            BadRecord(0, damage.cause, str(path), -1, "", damage.text)
            for path, damage in damaged.items()
            if damage.lost is None
        ]
        self._labels_of_folder = labels_of_folder

    @property
    def num_samples(self) -> int:
        """Number of samples in all shards."""
        return sum(index.samples for index in self.indexes)

    @cached_property
    def _labels_of_each(self) -> list[Labels]:
        """Label reader of each shard; shards in one folder share one reader."""
        shards: defaultdict[str, list[ShardIndex]] = defaultdict(list)
        for index in self.indexes:
            shards[folder_of(index.path)].append(index)
        for folder, indexes in shards.items():
            if folder not in self._labels_of_folder:
                self._labels_of_folder[folder] = self._labels_in(folder, indexes)
        return [self._labels_of_folder[folder_of(index.path)] for index in self.indexes]

    def _labels_in(self, folder: str, shards: Sequence[ShardIndex]) -> Labels:
        """Return the label reader of the shards in one folder. Beside class maps, the list of classes is of pixels."""
        present = any(index.may_have_labels for index in shards)
        of_pixels = not present and any(CLASS_MAP in index.extensions for index in shards)
        classes = Classes((), folder) if of_pixels else classes_beside(shards[0].path)
        return Labels(classes, present=present)

    @property
    def labels(self) -> list[Labels]:
        """Label readers, one for each folder."""
        return list({id(labels): labels for labels in self._labels_of_each}.values())

    def contents(self) -> list[tuple[str, int]]:
        """Return (name, number of samples) of each shard."""
        return [(index.path.name, index.samples) for index in self.indexes]

    def batches(self, *, limit: int | None, **options: Any) -> ShardBatches:
        """Return the samples in batches; see `ImageSplit.batches`."""
        return ShardBatches(self.shards, self._labels_of_each, limit=limit, **options)


def _check_images(shards: Sequence[ShardIndex], where: str) -> None:
    """Raise if a shard holds no images, because it is a wrong file; warn if samples have several images."""
    without = [shard for shard in shards if shard.images == 0]
    if without:
        found = ", ".join(f".{extension}" for extension in sorted(without[0].extensions)[:8])
        raise DataError(
            f"{where}: no image ({', '.join(IMAGE_EXTENSIONS)}) in {len(without):,} of {len(shards):,} shards; "
            f"{without[0].path} holds {found or 'nothing'}. Leave out such shards."
        )
    several = describe_several_images((shard.samples, shard.extensions) for shard in shards)
    if several and ranks.rank() == 0:
        _log.warning("%s: %s.", where, several)
