"""The images of one split of a data module, found and checked: how many, with which labels, in which batches."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from ssmpretrain.datamodules.faults.bad_samples import BadRecord
from ssmpretrain.datamodules.labels.classes import Labels
from ssmpretrain.datamodules.order.batches import PlannedBatches


class ImageSplit(ABC):
    """Images of one split that were found. Base class of `FolderSplit` and `ShardSplit`.

    Attributes:
        faults: Damaged shards that were found, each of which counts as one bad sample.
    """

    faults: Sequence[BadRecord] = ()

    @property
    @abstractmethod
    def num_samples(self) -> int:
        """Number of images."""

    @property
    @abstractmethod
    def labels(self) -> Sequence[Labels]:
        """Readers of the labels, one for each list of classes, in order; the same objects each time."""

    @abstractmethod
    def contents(self) -> list[tuple[str, int]]:
        """Return (name, samples) of each shard or file, in order."""

    @abstractmethod
    def batches(self, *, limit: int | None, **options: Any) -> PlannedBatches:
        """Return the images in batches.

        Args:
            limit: Use this many images, evenly spread; None uses all.
            **options: Arguments of `PlannedBatches`.
        """
