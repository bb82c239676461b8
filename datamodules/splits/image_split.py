"""Base class of the images of one split: their number, their labels and their batches."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from ssmpretrain.datamodules.faults.bad_samples import BadRecord
from ssmpretrain.datamodules.labels.classes import Labels
from ssmpretrain.datamodules.order.batches import PlannedBatches


class ImageSplit(ABC):
    """Base class of `FolderSplit` and `ShardSplit`: the images of one split, found and checked.

    Attributes:
        faults: Records of damaged shards; each counts as one bad sample.
    """

    faults: Sequence[BadRecord] = ()

    @property
    @abstractmethod
    def num_samples(self) -> int:
        """Number of images."""

    @property
    @abstractmethod
    def labels(self) -> Sequence[Labels]:
        """Label readers, one for each list of classes, in order. Every call returns the same objects."""

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
