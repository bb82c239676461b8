"""Rules for the objects of a COCO file: which are kept, in which form, and for which cause others are dropped."""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ssmpretrain.datamodules.faults.dropped_objects import DroppedObject
from ssmpretrain.datamodules.targets.annotations import is_box, is_count, is_number, why_untrainable
from ssmpretrain.datamodules.targets.run_lengths import check_runs, decode_runs, encode_runs

_TWICE = "id of an earlier object: both are kept, where pycocotools counts the last one in place of each"
_MOST_SIZES = 2  # corners of polygons lie at most this many sizes of the image away from its top left corner


class ObjectRules:
    """Rules for the objects of one file, with counts of what they do.

    Evaluation keeps every object that COCO's evaluator can hold, with bbox, area and iscrowd of the file. Training
    drops further ones, by the rules of mmdet; COCO's own files lose a few objects.

    Args:
        numbers: Class of each category, by the id of the file.
        file: The file, used in the list of dropped objects.
        masks: Whether masks are read. If so, an object without one is dropped.
        train: Whether the objects train, so that the rules of `why_untrainable` hold too.

    Attributes:
        dropped: The dropped objects.
        mended: Number of objects that were mended, by what was done.
        polygons: Whether an object has polygons.
    """

    def __init__(self, numbers: Mapping[Any, int], file: Path, *, masks: bool, train: bool) -> None:
        self._numbers, self._file, self._masks, self._train = numbers, str(file), masks, train
        self._ids = set[int | str]()
        self.dropped: list[DroppedObject] = []
        self.mended: Counter[str] = Counter()
        self.polygons = False

    def keep(self, one: Mapping[str, Any], image: str, place: int, h: int, w: int) -> dict[str, Any] | None:
        """Return an object as an `Annotation` has it, with `place`, or None if it is dropped.

        Polygons stay polygons. `area` is None if the file has none and the mask will tell it.

        Args:
            one: The object, as in the file.
            image: File name of its image.
            place: Its place in the list of the file, from 0.
            h, w: Height and width of its image in pixels.
        """
        try:
            return {**self._kept(one, h, w), "place": place}
        except _Dropped as dropped:
            self.drop(str(dropped), image, place)
            return None

    def drop(self, cause: str, image: str, place: int) -> None:
        """Record an object that cannot be used; `image` is empty if it is not known."""
        self.dropped.append(DroppedObject(cause, self._file, image, place))

    def _kept(self, one: Mapping[str, Any], h: int, w: int) -> dict[str, Any]:
        self._count_twice(one.get("id"))
        category = one.get("category_id")
        if not is_count(category) or category not in self._numbers:
            raise _Dropped("unknown category")
        box = one.get("bbox")
        if not is_box(box):
            raise _Dropped("bbox that is not four finite numbers")
        found = {"category": self._numbers[category], "bbox": box, **self._size(one)}
        if self._train and (cause := why_untrainable(found, h, w)):
            raise _Dropped(cause)
        if self._masks:
            found["segmentation"] = self._mask(one.get("segmentation"), h, w)
        elif found["area"] is None:
            found["area"] = float(found["bbox"][2] * found["bbox"][3])
        return found

    def _count_twice(self, number: object) -> None:
        """Count an id that an earlier object has. Ids are not used otherwise, and may be missing."""
        if isinstance(number, int | str):
            if number in self._ids:
                self.mended[_TWICE] += 1
            self._ids.add(number)

    def _size(self, one: Mapping[str, Any]) -> dict[str, Any]:
        """Return area and iscrowd."""
        area, crowd = one.get("area"), one.get("iscrowd")
        if area is None:
            self.mended["no area: that of the mask or the box is taken"] += 1
        elif not is_number(area):
            raise _Dropped("area that is no number")
        if crowd is None:
            self.mended["no iscrowd: 0 is taken"] += 1
        elif crowd not in (0, 1):
            raise _Dropped("iscrowd that is neither 0 nor 1")
        return {"area": area, "iscrowd": int(crowd or 0)}

    def _mask(self, code: Any, h: int, w: int) -> Any:
        if not code:
            raise _Dropped("no mask, in a file with masks")
        if isinstance(code, dict):
            return _runs(code, h, w)
        parts = _polygons(code, h, w)
        if not parts:
            raise _Dropped("polygon of fewer than three points")
        if len(parts) < len(code):
            self.mended["polygons of fewer than three points beside others: left out"] += 1
        self.polygons = True
        return parts


class _Dropped(Exception):
    """An object that cannot be used; the text is the cause."""


def _runs(code: Mapping[str, Any], h: int, w: int) -> dict[str, Any]:
    """Return a checked, compressed run-length code."""
    counts, size = code.get("counts"), code.get("size")
    if size != [h, w]:
        raise _Dropped("mask of another size than the image")
    try:
        if isinstance(counts, str):
            decode_runs({"size": size, "counts": counts})
            return {"size": [h, w], "counts": counts}
        if isinstance(counts, list) and all(map(is_count, counts)):
            runs = np.asarray(counts, dtype=np.int64)
            check_runs(runs, h, w)
            return encode_runs(runs, h, w)
    except (ValueError, OverflowError):
        pass
    raise _Dropped("broken run-length code")


def _polygons(code: Any, h: int, w: int) -> list[list[float]]:
    """Return the polygons that have at least three points."""
    parts = []
    for part in code if isinstance(code, list) else [None]:
        if not isinstance(part, list) or len(part) % 2 or not set(map(type, part)) <= {int, float}:
            raise _Dropped("mask that is neither polygons nor a run-length code")
        if len(part) < 6:
            continue
        if not (_are_near(part[::2], w) and _are_near(part[1::2], h)):
            finite = all(abs(corner) < math.inf for corner in part)  # isfinite raises for a huge integer
            raise _Dropped(
                "polygon far outside of the image" if finite else "polygon with a coordinate that is no finite number"
            )
        parts.append(part)
    return parts


def _are_near(corners: list[float], side: int) -> bool:
    """Return whether coordinates lie near the image; NaN does not. NumPy is slower for so few numbers."""
    return all(abs(corner) <= _MOST_SIZES * side for corner in corners)
