"""Result of a validation of a detector as a table to read, class by class."""

from __future__ import annotations

from typing import Any

from ssmpretrain.evaluation.accuracy import percent

_MEANS = {"AP": "ap", "AP50": "ap50", "AP75": "ap75"}


def table(content: dict[str, Any]) -> str:
    """Format scores with one line per class, and the means in the last lines.

    Args:
        content: The result of `DetectionScores.plain`.
    """
    kinds = {kind: content[kind] for kind in ("box", "mask") if content[kind] is not None}
    classes = list(content["box"]["per_class"])
    width = max(map(len, [*classes, "class"]))
    lines = [f"{'class':<{width}}" + "".join(f"  {kind + ' AP':>8}" for kind in kinds)]
    for name in classes:
        values = (f"  {_shown(scores['per_class'][name]):>8}" for scores in kinds.values())
        lines.append(f"{name:<{width}}" + "".join(values))
    for kind, scores in kinds.items():
        lines.append(", ".join(f"{kind} {name} {_shown(scores[key])}" for name, key in _MEANS.items()))
    return "\n".join(lines)


def _shown(score: float | None) -> str:
    return "-" if score is None else percent(score)
