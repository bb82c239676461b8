"""Objects of a COCO file: checked one by one, counted by cause if they cannot be used, and kept in compact form."""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssmpretrain.datamodules.dense.coco_file import CocoFile, CocoImage
from ssmpretrain.datamodules.targets.annotations import is_box, is_number
from ssmpretrain.datamodules.targets.run_lengths import check_runs, decode_runs, encode_runs

_NEEDED = ("image_id", "category_id", "bbox")
_FAR = 2.0  # a corner of a polygon lies within 2 lengths of the longer side around the image


class Unusable(Exception):
    """An object that cannot be used; the text is the cause under which it is counted."""


@dataclass
class Tally:
    """Counts of what was found wrong with the objects of a COCO file.

    Args:
        total: Number of objects in the file, without those of classes that are left out on purpose.
        dropped: Objects that cannot be used, (cause, name of the image, name of the object).
        notes: Number of objects that are used, by what was assumed or is remarkable.
    """

    total: int = 0
    dropped: list[tuple[str, str, str]] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    def causes(self) -> Counter[str]:
        """Count the dropped objects by cause."""
        return Counter(cause for cause, _, _ in self.dropped)


@dataclass(frozen=True)
class CocoObjects:
    """The usable objects of all images, as one block of bytes that processes share.

    Args:
        paths: Path of each image below the folder of the images, (N,).
        texts: Annotation of each image as JSON, one after another. Polygons are not masks yet.
        starts: Place of each annotation in `texts`, and the end, (N + 1,).
        is_empty: Whether an image has no object that trains; crowds do not, (N,).
        has_masks, has_polygons: Whether objects have masks, and whether some of them are polygons.
    """

    paths: NDArray[np.str_]
    texts: NDArray[np.uint8]
    starts: NDArray[np.int64]
    is_empty: NDArray[np.bool_]
    has_masks: bool
    has_polygons: bool

    def annotation(self, number: int) -> dict[str, Any]:
        """Return the annotation of an image, whose masks may be polygons, and whose areas may be missing."""
        text = self.texts[self.starts[number] : self.starts[number + 1]].tobytes()
        return json.loads(text)  # type: ignore[no-any-return]


def collect_objects(file: CocoFile, *, masks: bool, is_training: bool) -> tuple[CocoObjects, Tally]:
    """Check the objects of a COCO file, and collect the usable ones by image.

    Args:
        file: The file.
        masks: Whether masks are used. Otherwise they are not looked at.
        is_training: Whether objects are left out that mmdet leaves out of training: of an area of 0, or with a box
            thinner than a pixel. An evaluation keeps them, as COCO's does.
    """
    tally = Tally()
    objects: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    ids: Counter[object] = Counter()
    for place, row in enumerate(file.annotations):
        named = f"annotation {row['id']}" if isinstance(row, dict) and "id" in row else f"annotation at place {place}"
        image = file.images.get(_key(row, "image_id"))
        try:
            one = _object(row, file, image, tally.notes, masks=masks, is_training=is_training)
        except Unusable as reason:
            tally.total += 1
            tally.dropped.append((str(reason), image.path if image else "", named))
            continue
        if one is not None:
            tally.total += 1
            ids[_key(row, "id")] += 1
            objects[row["image_id"]].append({**one, "named": named})
    if repeated := sum(count for id, count in ids.items() if id is not None and count > 1):
        tally.notes["share their id with another object; both are used"] += repeated
    has_masks = any("segmentation" in one for each in objects.values() for one in each)
    if has_masks:
        _drop_without_mask(objects, file, tally)
    return _packed(file, objects, has_masks), tally


def _object(
    row: Any, file: CocoFile, image: CocoImage | None, notes: Counter[str], *, masks: bool, is_training: bool
) -> dict[str, Any] | None:
    """Return an object in the form of `Annotation`; None if its class is left out on purpose.

    Raises:
        Unusable: If the object cannot be used.
    """
    if not isinstance(row, dict):
        raise Unusable("annotations that are no dictionary")
    for name in _NEEDED:
        if name not in row:
            raise Unusable(f"objects without {name}")
    if image is None:
        raise Unusable("objects of images that are not listed")
    if (category := _key(row, "category_id")) not in file.numbers:
        raise Unusable("unknown categories")
    if (number := file.numbers[category]) is None:  # type: ignore[index]
        return None
    _check_box(row["bbox"], image, notes, is_training=is_training)
    one = {"category": number, "bbox": row["bbox"], "iscrowd": _crowd(row, notes)}
    if (area := _area(row, notes, is_training=is_training)) is not None:
        one["area"] = area
    if masks and row.get("segmentation"):
        one["segmentation"] = _segmentation(row["segmentation"], image, notes)
    return one


def _key(row: Any, name: str) -> int | None:
    """Return an id; None if there is none, or it is no integer."""
    value = row.get(name) if isinstance(row, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _check_box(box: Any, image: CocoImage, notes: Counter[str], *, is_training: bool) -> None:
    if not is_box(box):
        raise Unusable("boxes that are not four finite numbers")
    x, y, w, h = box
    if w <= 0 or h <= 0:
        raise Unusable("boxes without width or height")
    if is_training and (w < 1 or h < 1):
        raise Unusable("boxes thinner than a pixel")
    if min(x + w, image.width) <= max(x, 0) or min(y + h, image.height) <= max(y, 0):
        raise Unusable("boxes outside of the image")
    if min(x, y) < -1 or x + w > image.width + 1 or y + h > image.height + 1:
        notes["have a box that leaves the image by more than a pixel, as boxes x1, y1, x2, y2 do"] += 1


def _crowd(row: Mapping[str, Any], notes: Counter[str]) -> int:
    if "iscrowd" not in row:
        notes["have no iscrowd, which counts as 0"] += 1
        return 0
    if row["iscrowd"] not in (0, 1):
        raise Unusable("iscrowd that is neither 0 nor 1")
    return int(row["iscrowd"])


def _area(row: Mapping[str, Any], notes: Counter[str], *, is_training: bool) -> float | None:
    if row.get("area") is None:
        notes["have no area, which is computed from the mask, or from the box without a mask"] += 1
        return None
    if not is_number(row["area"]) or row["area"] < 0:
        raise Unusable("areas that are no number of pixels")
    if is_training and row["area"] == 0:
        raise Unusable("areas of 0")
    return float(row["area"])


def _segmentation(value: Any, image: CocoImage, notes: Counter[str]) -> Any:
    """Return a compressed run-length code, or the usable polygons."""
    if isinstance(value, dict):
        return _code(value, image)
    if not isinstance(value, list) or not all(isinstance(one, list) for one in value):
        raise Unusable("masks that are neither polygons nor run-length codes")
    usable = [one for one in value if len(one) >= 6 and len(one) % 2 == 0]
    if not usable:
        odd = any(len(one) % 2 for one in value)
        raise Unusable("polygons with a coordinate too many" if odd else "polygons of fewer than three points")
    if len(usable) < len(value):
        notes["have several polygons, of which those with too few points or an odd coordinate are left out"] += 1
    for one in usable:
        _check_polygon(one, image)
    return usable


def _code(value: Mapping[str, Any], image: CocoImage) -> dict[str, Any]:
    if value.get("size") != [image.height, image.width]:
        raise Unusable("masks of another size than their image")
    counts = value.get("counts")
    try:
        if isinstance(counts, str):
            runs = decode_runs({"size": value["size"], "counts": counts})
        else:
            runs = np.asarray(counts)
            if runs.ndim != 1 or runs.dtype.kind not in "iu":
                raise ValueError("counts are whole numbers")
            check_runs(runs, image.height, image.width)
    except (ValueError, OverflowError):
        raise Unusable("run-length codes that are damaged") from None
    if not runs[1::2].sum():
        raise Unusable("empty masks")
    return encode_runs(runs, image.height, image.width)


def _check_polygon(corners: list[Any], image: CocoImage) -> None:
    try:
        numbers = np.asarray(corners)
    except ValueError:  # lists of different lengths
        numbers = np.asarray("")
    if numbers.ndim != 1 or numbers.dtype.kind not in "iuf" or not np.isfinite(numbers).all():
        raise Unusable("polygons that are not lists of finite numbers")
    reach = _FAR * max(image.height, image.width)
    if numbers.min() < -reach or numbers.max() > reach + max(image.height, image.width):
        raise Unusable("polygons far outside of the image")


def _drop_without_mask(objects: dict[int, list[dict[str, Any]]], file: CocoFile, tally: Tally) -> None:
    for image, each in objects.items():
        for one in each:
            if "segmentation" not in one:
                tally.dropped.append(("objects without a mask", file.images[image].path, one["named"]))
        objects[image] = [one for one in each if "segmentation" in one]


def _packed(file: CocoFile, objects: Mapping[int, list[dict[str, Any]]], has_masks: bool) -> CocoObjects:
    texts, is_empty, has_polygons = [], [], False
    for id, image in file.images.items():
        each = objects.get(id, [])
        is_empty.append(all(one["iscrowd"] for one in each))
        has_polygons |= any(isinstance(one.get("segmentation"), list) for one in each)
        texts.append(json.dumps({"height": image.height, "width": image.width, "objects": each}).encode())
    starts = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    return CocoObjects(
        np.asarray([image.path for image in file.images.values()]),
        np.frombuffer(b"".join(texts), dtype=np.uint8),
        starts,
        np.asarray(is_empty),
        has_masks,
        has_polygons,
    )
