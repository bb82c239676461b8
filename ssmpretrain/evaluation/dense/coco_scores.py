"""COCO's average precision and recall, computed by pycocotools from plain data.

Legend: K classes, T IoU thresholds, R recalls, A area ranges, M limits of detections per image.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from typing import Any

from ssmpretrain.evaluation.dense.masks import mask_area, pycocotools

_AREAS = ("all", "small", "medium", "large")  # pixels: any, below 32^2, 32^2 to 96^2, above 96^2
_LIMITS = (1, 10, 100)


@dataclass(frozen=True)
class CocoScores:
    """COCO's summary for boxes or for masks, each in [0, 1]; NaN where the data have no object that could be found.

    Attributes:
        ap: Average precision, mean over the IoU thresholds 0.50, 0.55, ..., 0.95 and the classes that have objects.
        ap50, ap75: At the IoU threshold 0.50 or 0.75 alone.
        ap_small, ap_medium, ap_large: Of objects whose area is below 32^2 pixels, up to 96^2, or above.
        ar1, ar10, ar100: Average recall with at most so many detections per image and class.
        ar_small, ar_medium, ar_large: ar100 of objects of that area.
        per_class: `ap` of each class by name; NaN for a class without objects.
    """

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar1: float
    ar10: float
    ar100: float
    ar_small: float
    ar_medium: float
    ar_large: float
    per_class: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class DetectionScores:
    """Scores of a detector over a data set.

    Attributes:
        box: Scores of the boxes.
        mask: Scores of the masks; None if the detector predicts boxes alone.
        num_images: Number of images, each counted once.
    """

    box: CocoScores
    mask: CocoScores | None
    num_images: int

    def plain(self) -> dict[str, Any]:
        """Return the scores as JSON values, with None for NaN."""

        def of(scores: CocoScores) -> dict[str, Any]:
            rows = asdict(scores)
            classes = {name: _none_if_nan(value) for name, value in rows.pop("per_class").items()}
            return {name: _none_if_nan(value) for name, value in rows.items()} | {"per_class": classes}

        return {"box": of(self.box), "mask": of(self.mask) if self.mask else None, "num_images": self.num_images}

    def named(self) -> dict[str, float]:
        """Return the scores as "box_AP", "box_AP50", ..., "mask_AR_large", without those that are NaN."""
        found = {"box": self.box} | ({"mask": self.mask} if self.mask else {})
        return {
            f"{kind}_{name[:2].upper()}{name[2:]}": value
            for kind, scores in found.items()
            for name, value in asdict(scores).items()
            if isinstance(value, float) and not math.isnan(value)
        }


def coco_scores(images: Sequence[Mapping[str, Any]], classes: Sequence[str], *, of_masks: bool) -> CocoScores:
    """Evaluate the detections in `images`, whose order decides between detections of equal score.

    pycocotools reads files of COCO and stumbles over data of another form. This function builds its tables as it needs
    them: annotations have ids from 1, because it takes id 0 for "no match"; detections are no result file, because it
    cannot read an empty one; every object has `iscrowd`; and detections have the area of the mask where masks are
    evaluated, and of the box where boxes are.

    Args:
        images: One mapping per image: height, width, objects (as `Annotation` of datamodules), and the n detections:
            classes (n,), boxes (n, 4) of x, y, width, height, scores (n,), and masks, n counts of run-length codes.
        classes: Names of the K classes.
        of_masks: Whether masks are compared, else boxes.
    """
    truth, found = [], []
    for number, image in enumerate(images, 1):
        truth += [{**one, "image_id": number} for one in image["objects"]]
        found += _detections(image, number, of_masks)
    sizes = [{"id": number, "height": one["height"], "width": one["width"]} for number, one in enumerate(images, 1)]
    with redirect_stdout(io.StringIO()):  # it prints its progress
        tables = [_table(sizes, rows, len(classes)) for rows in (truth, found)]
        evaluation = pycocotools("cocoeval").COCOeval(*tables, "segm" if of_masks else "bbox")
        evaluation.params.maxDets = list(_LIMITS)
        evaluation.evaluate()
        evaluation.accumulate()
    return _summary(evaluation.eval["precision"], evaluation.eval["recall"], classes)


def _detections(image: Mapping[str, Any], number: int, of_masks: bool) -> list[dict[str, Any]]:
    """Return the detections of an image as pycocotools reads them."""
    rows = []
    columns = (image[name].tolist() for name in ("classes", "boxes", "scores"))
    for place, (category, box, score) in enumerate(zip(*columns, strict=True)):
        row = {"image_id": number, "category": category, "bbox": box, "score": score, "iscrowd": 0}
        if of_masks:
            code = {"size": [image["height"], image["width"]], "counts": image["masks"][place]}
            row |= {"segmentation": code, "area": mask_area(code)}
        else:
            row["area"] = box[2] * box[3]
        rows.append(row)
    return rows


def _table(images: list[dict[str, Any]], rows: list[dict[str, Any]], num_classes: int) -> Any:
    table = pycocotools("coco").COCO()
    annotations = [{**row, "id": number, "category_id": row["category"]} for number, row in enumerate(rows, 1)]
    categories = [{"id": number} for number in range(num_classes)]
    table.dataset = {"images": images, "categories": categories, "annotations": annotations}
    table.createIndex()
    return table


def _summary(precision: Any, recall: Any, classes: Sequence[str]) -> CocoScores:
    """Average the tables of pycocotools: precision (T, R, K, A, M) and recall (T, K, A, M), -1 where undefined."""
    per_class = {name: _mean(precision[:, :, number, 0, -1]) for number, name in enumerate(classes)}
    areas = _AREAS[1:]
    return CocoScores(
        ap=_mean(precision[..., 0, -1]),
        ap50=_mean(precision[0, ..., 0, -1]),
        ap75=_mean(precision[5, ..., 0, -1]),
        **{f"ap_{name}": _mean(precision[..., area, -1]) for area, name in enumerate(areas, 1)},
        **{f"ar{limit}": _mean(recall[..., 0, number]) for number, limit in enumerate(_LIMITS)},
        **{f"ar_{name}": _mean(recall[..., area, -1]) for area, name in enumerate(areas, 1)},
        per_class=per_class,
    )


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value


def _mean(values: Any) -> float:
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else math.nan
