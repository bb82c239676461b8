"""Base class of the data modules of dense tasks: the list of their classes, given or found, and its checks."""

from abc import abstractmethod
from pathlib import Path

from ssmpretrain.datamodules.labels.classes import Classes, read_classes
from ssmpretrain.datamodules.order.batches import PlannedBatches
from ssmpretrain.datamodules.splits.planned_data import PlannedData


class DenseData(PlannedData):
    """Base class of `SegmentationData` and `DetectionData`, whose classes are those of pixels or objects.

    Attributes:
        num_classes: Number of classes, if an argument or the data tell it; otherwise None.
    """

    num_classes: int | None

    def _take_classes(self, classes: list[str] | str | None) -> None:
        """Take the classes that an argument gives: their names, a file with them, or None for those of the data."""
        if isinstance(classes, str):
            self._own_classes = read_classes(Path(classes).expanduser())
        elif classes is not None:
            self._own_classes = Classes(tuple(classes), self._where)
        if self._own_classes is not None:
            self._check_names(self._own_classes)
        self._labels.use()  # two lists of classes that contradict each other are an error

    def _batches(self, split: str, *, train: bool, limit: int | None) -> PlannedBatches:
        batches = super()._batches(split, train=train, limit=limit)
        first = self._labels.classes  # a source may name only some of these
        for labels in self._images(split).labels:
            self._check_names(first if len(first.names) == self.num_classes else labels.known)
        return batches

    @abstractmethod
    def _check_names(self, classes: Classes) -> None:
        """Raise a DataError if the number of classes is not known, or contradicts `num_classes`."""
