"""Annotation file of a COCO data set: parsed once, checked, and kept as a few bytes for each image."""

import gc
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ssmpretrain.base.errors import DataError, PathMissing
from ssmpretrain.base.shown_names import shown
from ssmpretrain.base.wording import few
from ssmpretrain.datamodules.dense.coco_objects import ObjectRules
from ssmpretrain.datamodules.faults.bad_samples import too_many
from ssmpretrain.datamodules.faults.dropped_objects import DroppedObject, count_causes
from ssmpretrain.datamodules.files.folders import look_around
from ssmpretrain.datamodules.labels.classes import Classes
from ssmpretrain.datamodules.targets.annotations import is_count

_OBJECTS = "Give a file of COCO instances: images, categories, and annotations with bbox and category_id"
_OTHER_KINDS = {  # key of annotations without bbox: what such a file holds
    "caption": "captions",
    "segments_info": "segments of panoptic segmentation",
    "keypoints": "keypoints without boxes",
}


@dataclass(frozen=True)
class CocoFile:
    """Images of an annotation file with their objects, in the order of the file.

    Annotations are one block of bytes. A worker that is forked copies every page on which it counts references, so
    millions of Python objects would fill the memory of each.

    Args:
        path: The file.
        classes: Names of the categories in the order of their ids; class 0 has the smallest id.
        names: File name of each image, (n,).
        annotations: Annotation of each image as JSON, one after the other.
        ends: End of each image's part of `annotations`, (n,), int64.
        trainable: Number of objects of each image that are no crowds, (n,), int64.
        listed: Number of objects in the file.
        dropped: The dropped objects.
        mended: Number of mended objects by what was done.
        polygons: Whether masks have to be drawn from polygons.
    """

    path: Path
    classes: Classes
    names: NDArray[np.str_]
    annotations: bytes
    ends: NDArray[np.int64]
    trainable: NDArray[np.int64]
    listed: int
    dropped: Sequence[DroppedObject]
    mended: Mapping[str, int]
    polygons: bool

    def annotation(self, number: int) -> Any:
        """Return the annotation of an image; masks may be polygons, an area None, and objects have `place`."""
        start = int(self.ends[number - 1]) if number else 0
        return json.loads(self.annotations[start : int(self.ends[number])])


def read_coco(path: str, where: str, *, masks: bool, train: bool, max_dropped: float = 1.0) -> CocoFile:
    """Read and check an annotation file.

    Args:
        path: The file; "~" stands for the home folder.
        where: Name of the data module and split, which opens every message.
        masks: Whether masks are read, if the file has masks.
        train: Whether the objects train; evaluation keeps more of them, see `ObjectRules`.
        max_dropped: Fraction of the objects that may be dropped, as in `too_many`.

    Raises:
        FileNotFoundError: If the file does not exist.
        DataError: If it is no file of COCO instances, contradicts itself, or too many objects cannot be used.
    """
    file = Path(path).expanduser()
    named = f"{where}: {file}"
    content = _parsed(file, where)
    _check_kind(content, named)
    images, numbers = _images(content["images"], named), _categories(content["categories"], named)
    has_masks = any(isinstance(one, dict) and one.get("segmentation") for one in content["annotations"])
    rules = ObjectRules(
        {number: place for place, number in enumerate(numbers)}, file, masks=masks and has_masks, train=train
    )
    objects: list[list[dict[str, Any]]] = [[] for _ in images]
    places = {number: place for place, number in enumerate(images)}
    for number, one in enumerate(content["annotations"]):
        if not isinstance(one, dict):
            rules.drop("entry that is no dictionary", "", number)
        elif not isinstance(one.get("image_id"), int | str) or one["image_id"] not in places:
            rules.drop("unknown image", "", number)
        else:
            place = places[one["image_id"]]
            name, h, w = images[one["image_id"]]
            if (kept := rules.keep(one, name, number, h, w)) is not None:
                objects[place].append(kept)
    listed, causes = len(content["annotations"]), describe_counts(count_causes(rules.dropped))
    if not any(objects):
        raise DataError(
            f"{named}: holds objects that can be used; got {listed:,} annotations, all dropped: {causes}. Correct the "
            "file."
        )
    if too_many(len(rules.dropped), listed, max_dropped):
        raise DataError(
            f"{named}: {len(rules.dropped):,} of {listed:,} objects cannot be used, more than {max_dropped:.2%}: "
            f"{causes}; such as annotations[{rules.dropped[0].place}]. Correct the file, or raise max_bad_fraction."
        )
    parts = [
        json.dumps({"height": h, "width": w, "objects": each}, separators=(",", ":")).encode()
        for (_name, h, w), each in zip(images.values(), objects, strict=True)
    ]
    return CocoFile(
        path=file,
        classes=Classes(tuple(numbers.values()), str(file)),
        names=np.asarray([name for name, _, _ in images.values()]),
        annotations=b"".join(parts),
        ends=np.cumsum([len(part) for part in parts]),
        trainable=np.asarray([sum(not one["iscrowd"] for one in each) for each in objects]),
        listed=listed,
        dropped=rules.dropped,
        mended=dict(rules.mended),
        polygons=rules.polygons,
    )


class ListedImage(NamedTuple):
    """Entry of an image in a COCO file: its id, its path below the folder of the images, height and width in pixels."""

    id: int | str
    name: str
    height: int
    width: int


@dataclass(frozen=True)
class CocoIds:
    """Ids of the images and categories of a COCO file.

    Args:
        images: Entry of each image, by the parts of its file name.
        categories: Id of each category, by its name.
    """

    images: Mapping[tuple[str, ...], ListedImage]
    categories: Mapping[str, int]

    def image_at(self, path: Path) -> ListedImage | None:
        """Return the entry of the image at a path, which ends with its file name; the longest name counts."""
        parts = Path(os.path.abspath(path)).parts
        ends = (parts[start:] for start in range(1, len(parts)))
        return next((self.images[end] for end in ends if end in self.images), None)


def read_coco_ids(path: str, where: str) -> CocoIds:
    """Read the ids of an annotation file; it needs no annotations, as those of test sets.

    Args:
        path: The file; "~" stands for the home folder.
        where: Start of messages, such as the name of a command.

    Raises:
        FileNotFoundError: If the file does not exist.
        DataError: If it has no images or categories, or contradicts itself.
    """
    file = Path(path).expanduser()
    content, named = _parsed(file, where), f"{where}: {file}"
    for name in ("images", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(name), list) or not content[name]:
            raise DataError(f"{named}: a file of COCO lists images and categories; got no {name}. Give such a file.")
    images = _images(content["images"], named)
    return CocoIds(
        {PurePosixPath(name).parts: ListedImage(number, name, h, w) for number, (name, h, w) in images.items()},
        {name: number for number, name in _categories(content["categories"], named).items()},
    )


def describe_counts(counts: Mapping[str, int]) -> str:
    """Return counts as text, the most frequent first: "area of 0 or less (3); unknown category (1)"."""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return "; ".join(f"{cause} ({count:,})" for cause, count in ordered)


def _parsed(file: Path, where: str) -> Any:
    if not file.exists():
        raise PathMissing(f"{where}: no annotation file {file}; {look_around(file)}. Correct the path.")
    if not file.is_file():
        raise DataError(f"{where}: annotations are one JSON file; got {file}, which is none. {_OBJECTS}.")
    is_collecting = gc.isenabled()
    gc.disable()  # it would look through millions of new objects again and again, half of the time of reading
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {file}: cannot be read as JSON ({str(error)[:100]}). {_OBJECTS}.") from None
    except OSError as error:
        raise DataError(f"{where}: {file}: cannot be read ({error.strerror}). Check the file.") from None
    finally:
        if is_collecting:
            gc.enable()


def _check_kind(content: Any, named: str) -> None:
    """Raise if a file is of another kind, or lacks one of the three lists."""
    if not isinstance(content, dict):
        kind = "a list, as results of a detector are" if isinstance(content, list) else type(content).__name__
        raise DataError(f"{named}: is no file of COCO instances; got {kind}. {_OBJECTS}.")
    if "annotations" not in content and "images" in content:
        raise DataError(f"{named}: has images without annotations, as the files of test sets. {_OBJECTS}.")
    for name in ("images", "annotations", "categories"):
        if not isinstance(content.get(name), list):
            has = shown(few(sorted(content))) or "nothing"
            raise DataError(f"{named}: has no list of {name}, as a file of COCO instances has; got {has}. {_OBJECTS}.")
    annotations = [one for one in content["annotations"] if isinstance(one, dict)]
    if not any("bbox" in one for one in annotations):
        keys = {key for one in annotations for key in one}
        kind = next((what for key, what in _OTHER_KINDS.items() if key in keys), "")
        got = kind or (f"annotations with {shown(few(sorted(keys)))}" if keys else "no annotations")
        raise DataError(f"{named}: annotations are objects with a bbox; got {got}. {_OBJECTS}.")
    for name in ("images", "categories"):
        if not content[name]:
            raise DataError(f"{named}: the list of {name} is empty. {_OBJECTS}.")


def _images(entries: Sequence[Any], named: str) -> dict[int | str, tuple[str, int, int]]:
    """Return file name, height and width of each image by its id."""
    images: dict[int | str, tuple[str, int, int]] = {}
    names = set[str]()
    for place, one in enumerate(entries):
        which = f"{named}: images[{place:,}]"
        known = one if isinstance(one, dict) else {}
        number, name, h, w = (known.get(key) for key in ("id", "file_name", "height", "width"))
        if not isinstance(number, int | str) or isinstance(number, bool) or not isinstance(name, str) or not name:
            raise DataError(f"{which}: has an id and a file_name; got {_brief(one)}. Correct the file.")
        if not is_count(h) or not is_count(w) or not (h and w):
            raise DataError(
                f"{which}: height and width are positive integers, in pixels; got {h!r:.40} and {w!r:.40}. Correct "
                "the file."
            )
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise DataError(
                f"{which}: file_name is a path below the folder of the images; got {shown(name)}. Correct the file."
            )
        if number in images or name in names:
            twice = f"id {number!r}" if number in images else f"file_name {shown(name)}"
            raise DataError(f"{which}: each image is listed once; got {twice} again. Remove one of them.")
        images[number] = name, h, w
        names.add(name)
    return images


def _categories(entries: Sequence[Any], named: str) -> dict[int, str]:
    """Return the name of each category by its id, in the order of the ids."""
    found: dict[Any, str] = {}
    for place, one in enumerate(entries):
        which = f"{named}: categories[{place:,}]"
        known = one if isinstance(one, dict) else {}
        number, name = known.get("id"), known.get("name")
        if not is_count(number) or not isinstance(name, str) or not name:
            raise DataError(
                f"{which}: has an id, an integer of at least 0, and a name; got {_brief(one)}. Correct the file."
            )
        if number in found or name in found.values():
            twice = f"id {number}" if number in found else f"name {shown(name)}"
            raise DataError(f"{which}: each category is listed once; got {twice} again. Rename or remove one of them.")
        found[number] = name
    return dict(sorted(found.items()))


def _brief(value: Any) -> str:
    return shown(json.dumps(value)[:60])
