"""Dropped objects: parts of an annotation that cannot be used, while the rest of their image is."""

import json
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

from ssmpretrain.datamodules.faults.shared_lines import SharedLines


class DroppedObject(NamedTuple):
    """An object that is not used.

    Args:
        cause: A short phrase, equal for all objects with the same fault; objects are counted by it.
        file: File with the annotation.
        key: Name of the image; empty if it is not known.
        place: Place of the object in the list of objects of the file, from 0.
    """

    cause: str
    file: str
    key: str
    place: int


class DroppedObjects:
    """Counter of the dropped objects of a split, shared by all worker processes. An object counts once."""

    def __init__(self) -> None:
        self._lines = SharedLines()
        self._met: set[DroppedObject] = set()  # by this process
        self._known: dict[DroppedObject, None] = {}

    def add(self, dropped: DroppedObject) -> None:
        """Record an object, unless this process recorded it before."""
        if dropped not in self._met:
            self._met.add(dropped)
            with suppress(OSError):  # no room for the line
                self._lines.append(json.dumps(dropped))

    def records(self) -> list[DroppedObject]:
        """Return the dropped objects of all processes of this rank, each once."""
        for line in self._lines.new():
            with suppress(ValueError, TypeError):  # a line that was cut because there was no room for it
                self._known[DroppedObject(*json.loads(line))] = None
        return list(self._known)


def count_causes(dropped: Iterable[DroppedObject]) -> dict[str, int]:
    """Count dropped objects by cause."""
    return dict(Counter(one.cause for one in dropped))
