"""Checks of the objects in a batch, each with the name of the image that is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ssmpretrain.base.errors import DataError


def check_objects(batch: dict[str, Any], num_classes: int, *, needs_masks: bool) -> None:
    """Raise if the objects of a batch cannot train a detector.

    Args:
        batch: A batch with `image`, `objects` and `size`; see the data module. It is still on the CPU.
        num_classes: Number of classes.
        needs_masks: Whether every object needs a mask.

    Raises:
        DataError: If the batch has no objects, an object has a class outside 0 to num_classes - 1 or a box that is not
            finite, or masks are missing or do not have the size of the images.
    """
    check_fields(batch, "objects", "size")
    height, width = batch["image"].shape[-2:]
    for key, objects in _named(batch, "objects"):
        for number in objects["classes"].tolist():
            _check_class(number, num_classes, key)
        if not objects["boxes"].isfinite().all():
            raise DataError(
                f"Detection: boxes are finite numbers; got NaN or infinity in {key}. Correct or leave it out."
            )
        if not needs_masks or not len(objects["classes"]):
            continue
        if "masks" not in objects:
            raise _lacks_masks(key)
        if tuple(objects["masks"].shape[1:]) != (height, width):
            raise DataError(
                f"Detection: masks have the size of the batch's images, {height} x {width}; got "
                f"{tuple(objects['masks'].shape[1:])} for {key}. Pad images and masks alike."
            )


def image_with_empty_box(batch: dict[str, Any]) -> str | None:
    """Return the name of the first image in a batch that has a box without width or height; None if there is none."""
    for key, objects in _named(batch, "objects"):
        if (objects["boxes"][:, 2:] <= objects["boxes"][:, :2]).any():
            return key
    return None


def check_annotations(batch: dict[str, Any], num_classes: int, *, needs_masks: bool) -> None:
    """Raise if the annotations of a batch in evaluation cannot be compared with detections.

    Args:
        batch: A batch with `annotation`, `whole_size` and `key`.
        num_classes: Number of classes.
        needs_masks: Whether every object needs a mask.

    Raises:
        DataError: If there are no annotations, an object has a class outside 0 to num_classes - 1, or masks are
            missing.
    """
    check_fields(batch, "annotation", "whole_size", "key")
    for key, annotation in _named(batch, "annotation"):
        for one in annotation["objects"]:
            _check_class(one["category"], num_classes, key)
            if needs_masks and one.get("segmentation") is None:
                raise _lacks_masks(key)


def _named(batch: dict[str, Any], field: str) -> Iterator[tuple[str, Any]]:
    names = batch.get("key") or [f"image {number} of a batch" for number in range(len(batch[field]))]
    return zip(names, batch[field], strict=True)


def check_fields(batch: dict[str, Any], *names: str) -> None:
    """Raise a `DataError` if a batch lacks fields, because its data are of another task."""
    if lacking := [name for name in names if name not in batch]:
        raise DataError(
            f"Detection: the data give images with objects; these batches lack {', '.join(lacking)}. Use a data module "
            "of detection, such as CocoDetection or DetectionShards."
        )


def _check_class(number: int, num_classes: int, key: str) -> None:
    if not 0 <= number < num_classes:
        raise DataError(
            f"Detection: classes of objects are from 0 to {num_classes - 1}; got {number} in {key}. Set "
            "model.num_classes to the data's."
        )


def _lacks_masks(key: str) -> DataError:
    return DataError(
        f"Detection: this detector learns masks, so every object has one; {key} has objects without. Use data with "
        "masks (data.masks true), or set model.detector.name to faster_rcnn or cascade_rcnn for boxes alone."
    )
