"""Result of a validation of a detector, class by class: plain data for a file, and a table to read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ssmpretrain.evaluation.accuracy import percent
from ssmpretrain.evaluation.dense import CocoScores, DetectionScores

_IN_LAST_LINE = ("AP", "AP50", "AP75")


def report(scores: DetectionScores, classes: Sequence[str], step: int, match: str) -> dict[str, Any]:
    """Return the scores as JSON values; None where the data have no object that could be found.

    Args:
        scores: Scores of boxes, and of masks if the detector predicts them.
        classes: Names of the K classes.
        step: Optimizer steps before the validation.
        match: Rules of the detector, see `Match`.

    Returns:
        step, match, images, box and mask (a dict of all scores of `CocoScores`, or None), and classes: K dicts with
        number, name, box_AP and mask_AP.
    """
    kinds = {"box": scores.box} | ({"mask": scores.mask} if scores.mask else {})
    of_classes = [{f"{kind}_AP": _number(one.per_class[name]) for kind, one in kinds.items()} for name in classes]
    rows = enumerate(zip(classes, of_classes, strict=True))
    return {
        "step": step,
        "match": match,
        "images": scores.num_images,
        **{kind: _numbers(one) for kind, one in kinds.items()},
        "classes": [{"number": number, "name": name, **values} for number, (name, values) in rows],
    }


def table(content: dict[str, Any]) -> str:
    """Format the result of `report` with one line per class, and the means in the last lines."""
    kinds = [kind for kind in ("box", "mask") if kind in content]
    width = max(len(name) for name in [*(one["name"] for one in content["classes"]), "class"])
    lines = [f"{'class':<{width}}" + "".join(f"  {kind + ' AP':>8}" for kind in kinds)]
    for one in content["classes"]:
        lines.append(f"{one['name']:<{width}}" + "".join(f"  {_shown(one[f'{kind}_AP']):>8}" for kind in kinds))
    for kind in kinds:
        lines.append(", ".join(f"{kind} {name} {_shown(content[kind][name])}" for name in _IN_LAST_LINE))
    return "\n".join(lines)


def _numbers(scores: CocoScores) -> dict[str, float | None]:
    return {name: _number(value) for name, value in asdict(scores).items() if name != "per_class"}


def _number(score: float) -> float | None:
    return None if math.isnan(score) else score


def _shown(score: float | None) -> str:
    return "-" if score is None else percent(score)
