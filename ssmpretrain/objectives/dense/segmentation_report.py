"""Result of a validation of a segmentation, class by class: plain data for a file, and a table to read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ssmpretrain.evaluation.accuracy import percent
from ssmpretrain.evaluation.dense import SegmentationScores


def report(scores: SegmentationScores, classes: Sequence[str], step: int) -> dict[str, Any]:
    """Return the scores as JSON values; None where nothing was counted.

    Args:
        scores: Scores of the K classes.
        classes: Names of the classes; empty if they have none.
        step: Optimizer steps before the validation.

    Returns:
        step, mIoU, mAcc, aAcc, and classes: K dicts with number, name, IoU and Acc.
    """
    names: list[str | None] = [*classes] or [None] * len(scores.iou)
    rows = zip(names, scores.iou.tolist(), scores.acc.tolist(), strict=True)
    return {
        "step": step,
        "mIoU": _number(scores.miou),
        "mAcc": _number(scores.macc),
        "aAcc": _number(scores.aacc),
        "classes": [
            {"number": number, "name": name, "IoU": _number(iou), "Acc": _number(acc)}
            for number, (name, iou, acc) in enumerate(rows)
        ],
    }


def table(content: dict[str, Any]) -> str:
    """Format the result of `report` with one line per class, and the means in the last line."""
    names = [str(one["number"]) if one["name"] is None else one["name"] for one in content["classes"]]
    width = max(map(len, [*names, "class"]))
    lines = [f"{'class':<{width}}  {'IoU':>8}  {'Acc':>8}"]
    lines += [
        f"{name:<{width}}  {_shown(one['IoU']):>8}  {_shown(one['Acc']):>8}"
        for name, one in zip(names, content["classes"], strict=True)
    ]
    means = (f"{name} {_shown(content[name])}" for name in ("mIoU", "mAcc", "aAcc"))
    return "\n".join([*lines, ", ".join(means)])


def _number(score: float) -> float | None:
    return None if math.isnan(score) else score


def _shown(score: float | None) -> str:
    return "-" if score is None else percent(score)
