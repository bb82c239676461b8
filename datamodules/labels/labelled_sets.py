"""The labels of all sources of a data module, numbered by one list of classes."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from ssmpretrain.base import ranks
from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules.labels.classes import Classes, Labels

_log = logging.getLogger(__name__)
_UNKNOWN = Classes((), "the data")


class LabelledSets:
    """The labels of all sources, numbered as the first list of classes does: by default the first of training.

    Args:
        sources: Returns the labels of each source of "train" or "val", in order; none if there is no such split.
        said: Returns the classes that the data module itself gives, or None.
        where: Opens every message.
        judged: As in `Labels`.

    Attributes:
        splits: The splits whose labels were numbered.
    """

    def __init__(
        self,
        sources: Callable[[str], Sequence[Labels]],
        said: Callable[[], Classes | None],
        where: str,
        *,
        judged: bool,
    ) -> None:
        self._sources, self._said, self._where = sources, said, where
        self._judged, self._used = judged, False
        self._chosen: Classes | None = None
        self.splits: list[str] = []
        self._spoken: set[str] = set()
        self._unused: list[str] = []  # lines that hold as long as labels are not used

    @property
    def classes(self) -> Classes:
        """The list that numbers all labels; without names where nobody says them."""
        if chosen := self._chosen or self._said():
            return chosen
        if self.splits and not any(labels.own for split in self.splits for labels in self._sources(split)):
            return _UNKNOWN  # nobody needs to look for training data, which evaluation can do without
        lists = (labels.own for split in ("train", "val") for labels in self._sources(split))
        return next((own for own in lists if own), _UNKNOWN)

    def number(self, split: str) -> None:
        """Number the labels of a split, and say where that changes them.

        Raises:
            DataError: If its classes contradict the list, and labels are used or a checkpoint's list numbers them.
                Until then the images of such a source stay without labels instead.
        """
        if split not in self.splits:
            self.splits.append(split)
        first = self.classes
        for known in self.splits:
            for labels in self._sources(known):
                self._number(labels, first, known)

    def _number(self, labels: Labels, first: Classes, split: str) -> None:
        labels.judged = self._judged
        if not labels.own and (said := self._said()):
            labels.mean(said)
        try:
            self._say(labels.number_by(first, where=f"{self._where}: {split}"))
        except DataError as contradiction:
            if self._used or self._chosen is not None:
                raise
            labels.leave_out()
            self._unused.append(f"{contradiction} Until then its images have no label.")

    def number_by(self, classes: Classes) -> None:
        """Number all labels by this list from now on; raises as `number`."""
        self._chosen = classes
        self._number_again()

    def use(self) -> None:
        """Judge labels from now on: one that cannot be read makes a bad sample; raises as `number`."""
        self._judged = self._used = True
        self._unused.clear()
        self._number_again()

    def _number_again(self) -> None:
        if self.splits:
            self.number(self.splits[0])

    def say_of(self, labels: Labels, raw: dict[str, Any], which: str) -> None:
        """Note that the label of a sample, of which nobody makes use so far, cannot be read; `say_unused` says it."""
        if complaint := labels.complaint(raw):
            self._unused.append(f"{self._where}: {which} counts as unlabelled, and so may others: {complaint}.")

    def say_unused(self) -> None:
        """Say what holds only where labels are not used, when that is known: batches are asked for."""
        while self._unused:
            self._say(self._unused.pop(0))

    def _say(self, line: str) -> None:
        if line and line not in self._spoken:
            self._spoken.add(line)
            if ranks.rank() == 0:
                _log.warning("%s", line)
