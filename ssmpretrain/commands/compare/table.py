"""The table of runs, as text, Markdown, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ssmpretrain.base.shown_names import shown
from ssmpretrain.commands.compare.run_record import Point, RunRecord
from ssmpretrain.commands.compare.settings import Settings

FORMATS = ("text", "markdown", "csv", "json")
_WIDEST = 40  # letters of a setting in text and Markdown
_ABSENT = "-"


@dataclass(frozen=True)
class Compared:
    """One run of the table: its record, and its values of the settings in which the runs differ."""

    record: RunRecord
    settings: Settings


def render(
    runs: Sequence[Compared], settings: Sequence[str], metrics: Sequence[str], notes: Sequence[str], form: str
) -> str:
    """Return the table in one of `FORMATS`, followed by the notes where the format has a place for them.

    Args:
        runs: Rows of the table.
        settings: Names of the settings to show.
        metrics: Names of the metrics to show.
        notes: Remarks on single runs. CSV has no place for them.
        form: The format.
    """
    if form == "json":
        return json.dumps({"runs": [_plain(one, settings, metrics) for one in runs], "notes": list(notes)}, indent=2)
    if form == "csv":
        return _csv([_numbers(one, settings, metrics) for one in runs])
    cells = [_words(one, settings, metrics) for one in runs]
    rows = [list(cells[0]), *(list(row.values()) for row in cells)]
    if form == "markdown":
        lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
        lines.insert(1, "| --- |" + " --- |" * (len(cells[0]) - 1))
        return "\n".join([*lines, *(["", *(f"- {note}" for note in notes)] if notes else [])])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def _plain(run: Compared, settings: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
    record = run.record
    found = {name: (record.last(name), record.best(name)) for name in metrics}
    return {
        "run": record.name,
        "state": record.state,
        "steps": record.steps,
        "parameters": record.parameters,
        "settings": {name: run.settings[name] for name in settings if name in run.settings},
        "metrics": {
            name: {"last": last._asdict(), "best": best._asdict()}
            for name, (last, best) in found.items()
            if last and best
        },
    }


def _numbers(run: Compared, settings: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
    """Return the cells of a run with whole numbers and uncut texts."""
    record = run.record
    row: dict[str, Any] = {"run": record.name}
    row |= {name: _text(run.settings[name]) if name in run.settings else None for name in settings}
    row |= {"state": record.state, "steps": record.steps, "parameters": record.parameters}
    for name in metrics:
        for which, point in (("last", record.last(name)), ("best", record.best(name))):
            row[f"{name} {which}"], row[f"{name} {which} step"] = point or (None, None)
    return row


def _words(run: Compared, settings: Sequence[str], metrics: Sequence[str]) -> dict[str, str]:
    """Return the cells of a run as a person reads them."""
    record = run.record
    row = {"run": shown(record.name)}
    row |= {name: _cut(shown(_text(run.settings[name]))) if name in run.settings else _ABSENT for name in settings}
    row |= {"steps": f"{record.steps:,}"}
    row |= {"parameters": _ABSENT if record.parameters is None else f"{record.parameters:,}"}
    for name in metrics:
        row[name], row[f"best {name}"] = _point(record.last(name)), _point(record.best(name))
    return row


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")


def _point(point: Point | None) -> str:
    return _ABSENT if point is None else f"{point.value:.4g} @ {point.step:,}"


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else json.dumps(value, default=str)


def _cut(text: str) -> str:
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 3]}..."
