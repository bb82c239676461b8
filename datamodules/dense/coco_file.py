"""Content of a COCO file: its images and categories, checked as a whole before anything is read."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ssmpretrain.base.errors import DataError, PathMissing
from ssmpretrain.base.shown_names import shown
from ssmpretrain.base.wording import few, nearest
from ssmpretrain.datamodules.files.folders import look_around
from ssmpretrain.datamodules.files.image_files import IMAGE_EXTENSIONS
from ssmpretrain.datamodules.labels.classes import Classes

_TABLES = ("images", "annotations", "categories")
# A field that instances lack, and the file that it belongs to.
_OTHERS = {"segments_info": "panoptic segmentation", "caption": "captions"}


@dataclass(frozen=True)
class CocoImage:
    """One image of a COCO file: its path below the folder of the images, and its size in pixels."""

    path: str
    height: int
    width: int


@dataclass(frozen=True)
class CocoFile:
    """The checked tables of a COCO file.

    Args:
        images: The images by their ids, in the order of the file.
        annotations: The objects, unchecked.
        classes: Names of the classes, in the order of their numbers.
        numbers: Number of each category by its id; None for a category that is left out.
    """

    images: Mapping[int, CocoImage]
    annotations: Sequence[Any]
    classes: Classes
    numbers: Mapping[int, int | None]


def read_coco(path: Path, wanted: Classes | None, where: str) -> CocoFile:
    """Read a COCO file of instances.

    Args:
        path: The file.
        wanted: Classes to use, in the order of their numbers; None for all, in the order of their ids.
        where: Name of the data module and split, which opens every message.

    Raises:
        PathMissing: If the file does not exist.
        DataError: If it cannot be read, is no COCO file, or its images or categories are wrong.
    """
    images, annotations, categories = _tables(path, where)
    says = f"{where}: {path}"
    classes, numbers = _numbered(_categories(categories, says), wanted, path, says)
    return CocoFile(_images(images, says), annotations, classes, numbers)


def _tables(path: Path, where: str) -> list[list[Any]]:
    try:
        if not path.is_file():
            raise PathMissing(f"{where}: no COCO file {path}; {look_around(path)}. Correct the path.")
        content: Any = json.loads(path.read_bytes())
    except OSError as error:
        if isinstance(error, PathMissing):
            raise
        raise DataError(f"{where}: {path} cannot be read ({error.strerror}). Check the file.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {path} is not JSON ({str(error)[:100]}). Give a COCO file of instances.") from None
    found = content if isinstance(content, dict) else {}
    if lacking := [name for name in _TABLES if not isinstance(found.get(name), list)]:
        has = few([str(name)[:40] for name in found]) if isinstance(content, dict) else f"a {type(content).__name__}"
        raise DataError(
            f"{where}: a COCO file has the lists {', '.join(_TABLES)}; got {shown(has)} in {path}, without "
            f"{', '.join(lacking)}. Give a COCO file of instances."
        )
    first = found["annotations"][0] if found["annotations"] else {}
    for field, kind in _OTHERS.items():
        if isinstance(first, dict) and field in first:
            raise DataError(f"{where}: {path} is a file of {kind}; got {field} in its annotations. Give instances.")
    return [found[name] for name in _TABLES]


def _categories(rows: Sequence[Any], says: str) -> dict[int, str]:
    """Return the name of each category by its id, in the order of the ids."""
    if not rows:
        raise DataError(f"{says}: categories name the classes; got none. Add the categories to the file.")
    for row in rows:
        _check_fields(row, {"id": int, "name": str}, "category", says)
    _check_once((row["id"] for row in rows), "categories have different ids", says)
    _check_once((row["name"] for row in rows), "categories have different names", says)
    return {row["id"]: row["name"] for row in sorted(rows, key=lambda row: row["id"])}


def _numbered(
    names: Mapping[int, str], wanted: Classes | None, path: Path, says: str
) -> tuple[Classes, dict[int, int | None]]:
    classes = wanted or Classes(tuple(names.values()), str(path))
    numbers = {name: number for number, name in enumerate(classes.names)}
    if lacking := [name for name in classes.names if name not in names.values()]:
        raise DataError(
            f"{says}: classes are names of its categories; got {shown(lacking[0])!r}. "
            f"{nearest(lacking[0], names.values(), 'The categories')}"
        )
    return classes, {id: numbers.get(name) for id, name in names.items()}


def _images(rows: Sequence[Any], says: str) -> dict[int, CocoImage]:
    if not rows:
        raise DataError(f"{says}: images are listed; got an empty list. Give the file that belongs to the images.")
    for row in rows:
        _check_fields(row, {"id": int, "file_name": str, "height": int, "width": int}, "image", says)
        _check_image(row, says)
    _check_once((row["id"] for row in rows), "images have different ids", says)
    _check_once((row["file_name"] for row in rows), "images have different file names", says)
    return {row["id"]: CocoImage(row["file_name"], row["height"], row["width"]) for row in rows}


def _check_image(row: Mapping[str, Any], says: str) -> None:
    if row["height"] < 1 or row["width"] < 1:
        raise DataError(
            f"{says}: height and width are numbers of pixels; got {row['height']} x {row['width']} for image "
            f"{row['id']}. Correct the file."
        )
    path = PurePosixPath(row["file_name"])
    if path.is_absolute() or ".." in path.parts or not row["file_name"]:
        raise DataError(
            f"{says}: file_name is a path below the folder of the images; got {shown(row['file_name'])[:80]!r} for "
            f"image {row['id']}. Write the paths relative to the folder."
        )
    if path.suffix[1:].lower() not in IMAGE_EXTENSIONS:
        raise DataError(
            f"{says}: images are {', '.join(IMAGE_EXTENSIONS)}; got file_name {shown(row['file_name'])[:80]!r} for "
            f"image {row['id']}. Convert the images, and correct the file."
        )


def _check_fields(row: Any, kinds: Mapping[str, type], what: str, says: str) -> None:
    if not isinstance(row, dict):
        raise DataError(f"{says}: each {what} is a dictionary; got {str(row)[:60]}. Correct the file.")
    for name, kind in kinds.items():
        if name not in row:
            raise DataError(f"{says}: each {what} has {', '.join(kinds)}; got {str(row)[:100]} without {name}. Add it.")
        if not isinstance(row[name], kind) or isinstance(row[name], bool):
            is_a = "an integer" if kind is int else "a text"
            raise DataError(
                f"{says}: {name} of an {what} is {is_a}; got {row[name]!r:.60}. Correct the file.".replace(
                    "an category", "a category"
                )
            )


def _check_once(values: Iterable[object], what: str, says: str) -> None:
    value, count = Counter(values).most_common(1)[0]
    if count > 1:
        raise DataError(f"{says}: {what}; got {shown(str(value))[:80]} {count:,} times. Correct the file.")
