"""Annotation of one image: read from the `json` of a sample, checked, with the classes of another list."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ssmpretrain.datamodules.decoding.decode import image_of
from ssmpretrain.datamodules.decoding.image_header import pixel_size
from ssmpretrain.datamodules.faults.bad_samples import BadSample
from ssmpretrain.datamodules.targets.batches import Annotation
from ssmpretrain.datamodules.targets.run_lengths import decode_runs

EMPTY_MASK = "mask without a pixel"  # why an object does not train, found when its mask is read
_LARGEST = 1e12  # more than the pixels of any image
_FIELDS = ("height", "width", "objects")


def is_annotation(raw: Mapping[str, Any]) -> bool:
    """Return whether the `json` of a raw sample looks like the annotation of an image."""
    try:
        content = json.loads(raw.get("json", b""))
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and all(name in content for name in _FIELDS)


def annotation_of(raw: Mapping[str, Any], num_classes: int, named: str) -> Annotation:
    """Read the annotation of a raw sample, and check it. Its objects can be evaluated; some may not train.

    Args:
        raw: Fields of the sample, undecoded.
        num_classes: Number K of classes; objects have a class from 0 to K - 1.
        named: Source of the classes, used in messages.

    Raises:
        BadSample: If the sample has no image or no annotation, they have different sizes, or an object is wrong.
    """
    image = image_of(raw)
    annotation = _parsed(raw)
    check_size(image, annotation["height"], annotation["width"])
    for number, one in enumerate(annotation["objects"]):
        _check_object(one, annotation, num_classes, named, f"object {number}")
    has_mask = ["segmentation" in one for one in annotation["objects"]]
    if any(has_mask) and not all(has_mask):
        raise BadSample("objects without a mask", f"object {has_mask.index(False)}, beside others with a mask")
    return annotation


def renumber(annotation: Annotation, numbers: Sequence[int] | None) -> Annotation:
    """Return the annotation with class `numbers[c]` in place of c, to match another list; None changes nothing."""
    if numbers is None:
        return annotation
    objects = [{**one, "category": numbers[one["category"]]} for one in annotation["objects"]]
    return {**annotation, "objects": objects}


def why_untrainable(one: Mapping[str, Any], h: int, w: int) -> str | None:
    """Return why an object does not train, a short phrase, or None if it trains. Evaluation counts it in any case.

    The rules are mmdet's (`filter_cfg` aside): the area is above 0, the box has 1 pixel or more in width and height,
    and it meets the image. An area of None is not judged.

    Args:
        one: The object, with bbox and area.
        h, w: Height and width of its image in pixels.
    """
    x, y, width, height = one["bbox"]
    if one["area"] is not None and one["area"] <= 0:
        return "area of 0 or less"
    if min(width, height) < 1:
        return "box narrower or lower than 1 pixel"
    if min(x + width, w) <= max(x, 0) or min(y + height, h) <= max(y, 0):
        return "box outside of the image"
    return None


def is_number(value: object) -> bool:
    """Return whether a value from JSON is a finite number of a usual size; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST


def is_count(value: object) -> bool:
    """Return whether a value from JSON is an integer of at least 0; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_box(value: object) -> bool:
    """Return whether a value from JSON is a list of four finite numbers."""
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value))


def check_size(image: bytes, h: int, w: int) -> None:
    """Check that an encoded image has the height and width of its annotation.

    Raises:
        BadSample: If it is no image, or of another size.
    """
    try:
        width, height = pixel_size(image)
    except ValueError as error:
        raise BadSample("undecodable images", str(error)) from None
    if (height, width) != (h, w):
        turned = "; an orientation in EXIF is not applied" if (height, width) == (w, h) else ""
        raise BadSample(
            "annotations of another size", f"image {width:,} x {height:,}, annotation {w:,} x {h:,} pixels{turned}"
        )


def _parsed(raw: Mapping[str, Any]) -> Annotation:
    if "json" not in raw:
        fields = ", ".join(sorted(name for name in raw if not name.startswith("__")))
        raise BadSample("images without an annotation", f"no json; fields: {fields}")
    try:
        content: Any = json.loads(raw["json"])
    except (ValueError, RecursionError) as error:
        raise BadSample("undecodable annotations", str(error)[:100]) from None
    if not isinstance(content, dict) or any(name not in content for name in _FIELDS):
        has = ", ".join(sorted(content)[:8]) if isinstance(content, dict) else type(content).__name__
        raise BadSample("images without an annotation", f"the json has {', '.join(_FIELDS)}; got {has[:100]}")
    h, w, objects = (content[name] for name in _FIELDS)
    if not (
        is_count(h) and is_count(w) and isinstance(objects, list) and all(isinstance(one, dict) for one in objects)
    ):
        raise BadSample("undecodable annotations", "height and width are integers, and objects a list of dictionaries")
    return {"height": h, "width": w, "objects": objects}


def _check_object(one: Mapping[str, Any], annotation: Annotation, num_classes: int, named: str, which: str) -> None:
    category = one.get("category")
    if not is_count(category):
        raise BadSample("bad categories", f"{which}: a class is a number from 0; got {str(category)[:40]!r}")
    if category >= num_classes:  # type: ignore[operator]
        raise BadSample("bad categories", f"{which} has class {category}; {named}")
    box = one.get("bbox")
    if not is_box(box):
        raise BadSample("bad boxes", f"{which}: bbox is x, y, width, height, finite numbers; got {str(box)[:60]}")
    if not is_number(one.get("area")) or one.get("iscrowd") not in (0, 1):
        raise BadSample("undecodable annotations", f"{which}: area is a number and iscrowd 0 or 1")
    if "segmentation" in one:
        _check_mask(one["segmentation"], annotation["height"], annotation["width"], which)


def _check_mask(code: Any, h: int, w: int, which: str) -> None:
    if not isinstance(code, dict) or not isinstance(code.get("counts"), str) or "size" not in code:
        raise BadSample("bad masks", f"{which}: a mask is a compressed run-length code of size and counts")
    if code["size"] != [h, w]:
        raise BadSample("masks of another size", f"{which}: image {h} x {w}, mask {str(code['size'])[:40]}")
    try:
        decode_runs(code)
    except ValueError as error:
        raise BadSample("bad masks", f"{which}: {error}") from None
