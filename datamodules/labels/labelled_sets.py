"""Labels of all sources of a data module, numbered by one list of classes."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from ssmpretrain.base import ranks
from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules.labels.classes import Classes, Labels

_log = logging.getLogger(__name__)
_UNKNOWN = Classes((), "the data")


class LabelledSets:
    """Labels of all sources of a data module, numbered by one list of classes.

    The list comes from a checkpoint, or from the data module, or from the first source of training that has one.

    Args:
        sources: Returns the label reader of each source of "train" or "val", in order; empty without such a split.
        said: Returns the classes that the data module itself gives, or None.
        where: Name of the data module, which opens every message.
        judged: Whether an unreadable label makes its sample a bad sample, as in `Labels`.

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
        """The list that numbers all labels; it has no names if they are not known."""
        if chosen := self._chosen or self._said():
            return chosen
        if self.splits and not any(labels.own for split in self.splits for labels in self._sources(split)):
            return _UNKNOWN  # an evaluation does not need the training data, so they are not searched for
        lists = (labels.own for split in ("train", "val") for labels in self._sources(split))
        return next((own for own in lists if own), _UNKNOWN)

    def number(self, split: str) -> None:
        """Number the labels of a split by the list of classes, and log a warning if that changes them.

        If the classes of a source contradict the list, its images count as unlabelled as long as nothing uses labels.

        Raises:
            DataError: If the classes of a source contradict the list, and labels are used or the list comes from a
                checkpoint.
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
        """Number all labels by this list from now on; raise the errors of `number`."""
        self._chosen = classes
        self._number_again()

    def use(self) -> None:
        """Count a sample with an unreadable label as bad from now on; raise the errors of `number`."""
        self._judged = self._used = True
        self._unused.clear()
        self._number_again()

    def _number_again(self) -> None:
        if self.splits:
            self.number(self.splits[0])

    def say_of(self, labels: Labels, raw: dict[str, Any], which: str) -> None:
        """Prepare a warning if the label of a sample cannot be read; `say_unused` logs it.

        Args:
            labels: Reader of the label.
            raw: Fields of the sample.
            which: Name of the sample, used in the warning.
        """
        if complaint := labels.complaint(raw):
            self._unused.append(f"{self._where}: {which} counts as unlabelled, and so may others: {complaint}.")

    def say_unused(self) -> None:
        """Log the warnings that matter only if labels are not used; called when batches are requested."""
        while self._unused:
            self._say(self._unused.pop(0))

    def _say(self, line: str) -> None:
        if line and line not in self._spoken:
            self._spoken.add(line)
            if ranks.rank() == 0:
                _log.warning("%s", line)
