"""Detections and annotations of images, collected over a data set and over ranks in plain data.

Legend: n detections of an image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ssmpretrain.base import ranks
from ssmpretrain.base.errors import DataError, UserError
from ssmpretrain.base.wording import few
from ssmpretrain.evaluation.dense.coco_scores import DetectionScores, coco_scores
from ssmpretrain.evaluation.dense.masks import Rle, mask_area, pycocotools


class DetectionRecords:
    """Collect the detections and the annotation of every image, each image once, and evaluate them as COCO does.

    Every rank adds its own images, in any number. A sampler that repeats images to give ranks equal shares changes
    nothing: an image that was added before, here or on another rank, is left out.

    Raises:
        UserError: If pycocotools is not installed.
    """

    def __init__(self) -> None:
        pycocotools("mask")  # before hours of training, not after
        self._images: dict[str, dict[str, Any]] = {}
        self._is_gathered = False

    def __len__(self) -> int:
        return len(self._images)

    def add(
        self,
        key: str,
        annotation: Mapping[str, Any],
        boxes: Tensor,
        scores: Tensor,
        classes: Tensor,
        masks: Sequence[Rle] | None = None,
    ) -> None:
        """Add an image; n may be 0, and the image may have no objects.

        Args:
            key: Name of the image, unique in the data set.
            annotation: `height` and `width` of the file in pixels, and `objects`: dicts with category (int, from 0) and
                bbox (x, y, width, height), and optionally segmentation (compressed RLE), area (pixels; by default that
                of the mask, or of the box if there is no mask) and iscrowd (0 or 1; by default 0).
            boxes: Corners x1, y1, x2, y2 in pixels of the file, (n, 4).
            scores: Scores (n,), the greater the surer.
            classes: Classes (n,), integers from 0.
            masks: n masks of the size of the file, from `paste_masks`; None if the detector predicts no masks.

        Raises:
            UserError: If the detections have wrong shapes, a box or score is not finite, a box ends before it begins,
                or a mask has another size than the image.
            DataError: If the annotation is wrong, or another image has this key.
        """
        if self._is_gathered:
            raise UserError("DetectionRecords: gathered records hold the images of all ranks. Collect in new ones.")
        image = {**_annotation(key, annotation), **_detections(key, annotation, boxes, scores, classes, masks)}
        self._keep(key, image)

    def gather(self) -> DetectionRecords:
        """Collect the images of all ranks in place, and return the records. Every rank must call it, once or more."""
        if not self._is_gathered:
            parts = ranks.gather(self._images)
            self._images, self._is_gathered = {}, True
            for part in parts:
                for key, image in part.items():
                    self._keep(key, image)
        return self

    def evaluate(self, classes: Sequence[str]) -> DetectionScores:
        """Compute the average precision of boxes, and of masks if the detector predicts them.

        Rank 0 computes, and all ranks get the result. Every rank must call it.

        Args:
            classes: Names of the classes, in the order of their numbers.

        Raises:
            UserError: If there are several ranks and `gather` was not called, a detection has a class without a name,
                or only some images have masks.
            DataError: If an object has a class without a name, or has no mask to compare masks with.
        """
        if not self._is_gathered and ranks.world() > 1:
            raise UserError(
                "DetectionRecords: the scores are of all ranks. Call gather() on every rank before evaluate()."
            )
        outcome: DetectionScores | Exception | None = None
        if ranks.rank() == 0:
            try:
                outcome = self._evaluated(classes)
            except Exception as error:  # all ranks raise it, or the others would wait for ever
                outcome = error
        outcome = ranks.gather(outcome)[0]
        if isinstance(outcome, Exception):
            raise outcome
        assert outcome is not None
        return outcome

    def _keep(self, key: str, image: dict[str, Any]) -> None:
        known = self._images.setdefault(key, image)
        if any(known[name] != image[name] for name in ("height", "width", "objects")):
            raise DataError(
                f"DetectionRecords: an image has a key of its own; {key!r} names two images with different "
                "annotations. Give the images unique names, or pack the shards anew."
            )

    def _evaluated(self, classes: Sequence[str]) -> DetectionScores:
        if twice := [repr(name) for name in dict.fromkeys(classes) if list(classes).count(name) > 1]:
            raise UserError(f"DetectionRecords: classes have different names; got {few(twice)} twice. Rename one.")
        # The order of images decides between equal scores, so it must not depend on the number of ranks.
        images = [self._images[key] for key in sorted(self._images)]
        _check_classes(self._images, len(classes))
        has_masks = _has_masks(self._images)
        mask = coco_scores(images, classes, of_masks=True) if has_masks else None
        return DetectionScores(coco_scores(images, classes, of_masks=False), mask, len(images))


def _annotation(key: str, annotation: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checked annotation whose objects have every entry that the evaluation needs."""
    try:
        size = [int(annotation["height"]), int(annotation["width"])]
        return {"height": size[0], "width": size[1], "objects": [_object(one, size) for one in annotation["objects"]]}
    except KeyError as error:
        raise DataError(f"DetectionRecords: the annotation of {key!r} lacks {error}. Add it.") from None
    except (TypeError, ValueError) as error:
        raise DataError(f"DetectionRecords: the annotation of {key!r} is wrong: {error}. Correct it.") from None


def _object(row: Mapping[str, Any], size: list[int]) -> dict[str, Any]:
    box = [float(number) for number in row["bbox"]]
    if len(box) != 4 or not all(map(math.isfinite, box)):
        raise ValueError(f"a bbox is x, y, width, height, finite numbers; got {row['bbox']}")
    code = row.get("segmentation")
    if code is not None:
        _check_mask(code, size)
    area = row.get("area")
    if area is None:
        area = mask_area(code) if code is not None else box[2] * box[3]
    found = {"category": int(row["category"]), "bbox": box, "area": float(area), "iscrowd": int(row.get("iscrowd", 0))}
    return found | ({} if code is None else {"segmentation": code})


def _check_mask(code: Any, size: list[int]) -> None:
    if not isinstance(code, Mapping) or not isinstance(code.get("counts"), str | bytes):
        raise ValueError(f"a segmentation is a compressed run-length code, with size and counts; got {code!r:.60}")
    if list(code["size"]) != size:
        raise ValueError(f"a mask has the size of its image, {size}; got {list(code['size'])}")


def _detections(
    key: str,
    annotation: Mapping[str, Any],
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    masks: Sequence[Rle] | None,
) -> dict[str, Any]:
    """Return checked detections in arrays: 100 detections of 5000 images stay in memory, and travel between ranks."""
    n = len(scores)
    if (
        boxes.shape != (n, 4)
        or scores.shape != (n,)
        or classes.shape != (n,)
        or (masks is not None and len(masks) != n)
    ):
        raise UserError(
            f"DetectionRecords: boxes (n, 4), scores (n,), classes (n,) and masks have one n; got for {key!r} "
            f"{tuple(boxes.shape)}, {tuple(scores.shape)}, {tuple(classes.shape)} and "
            f"{'no masks' if masks is None else len(masks)}. Pass the detections of one image."
        )
    if not (boxes.isfinite().all() and scores.isfinite().all()):
        raise UserError(
            f"DetectionRecords: boxes and scores are finite numbers; got NaN or infinity for {key!r}. "
            "Look at the detector: it may have diverged."
        )
    if (boxes[:, 2:] < boxes[:, :2]).any():
        raise UserError(
            f"DetectionRecords: boxes are corners x1, y1, x2, y2; got x2 < x1 or y2 < y1 for {key!r}. "
            "Convert boxes of x, y, width, height."
        )
    if classes.is_floating_point():
        raise UserError(f"DetectionRecords: classes are integers; got {classes.dtype} for {key!r}. Convert them.")
    size = [annotation["height"], annotation["width"]]
    for code in masks or ():
        try:
            _check_mask(code, size)
        except ValueError as error:
            raise UserError(f"DetectionRecords: {error} for {key!r}. Use paste_masks.") from None
    boxes = boxes.detach().double().cpu()
    return {
        "boxes": torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).numpy(),
        "scores": scores.detach().double().cpu().numpy(),
        "classes": classes.long().cpu().numpy(),
        "masks": None if masks is None else [code["counts"] for code in masks],
    }


def _check_classes(images: Mapping[str, Mapping[str, Any]], num_classes: int) -> None:
    """Raise if an object or a detection has a class without a name; pycocotools would leave it out in silence."""
    for kind, classes_of, error in (
        ("an object", lambda image: (one["category"] for one in image["objects"]), DataError),
        ("a detection", lambda image: image["classes"].tolist(), UserError),
    ):
        found = {(key, category) for key, image in images.items() for category in classes_of(image)}
        if wrong := sorted(pair for pair in found if not 0 <= pair[1] < num_classes):
            raise error(
                f"DetectionRecords: {kind} has one of {num_classes} classes, 0 to {num_classes - 1}; got "
                f"{few([f'{category} in {key!r}' for key, category in wrong], 3)}. Correct the names of the classes."
            )


def _has_masks(images: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return whether masks can be compared; raise if only some can, which would make another data set of the rest."""
    without = [repr(key) for key, image in images.items() if image["masks"] is None]
    if len(without) == len(images):
        return False
    if without:
        raise UserError(
            f"DetectionRecords: all images have masks or none; got none for {few(without, 3)}. Pass [] there."
        )
    bare = [repr(key) for key, image in images.items() if any("segmentation" not in one for one in image["objects"])]
    if bare:
        raise DataError(
            f"DetectionRecords: masks are compared with the mask of each object; {few(bare, 3)} has objects without. "
            "Add masks to the data, or use a detector of boxes alone."
        )
    return True
