"""The command line of `compare`: which runs, which metrics, in which order and format."""

from __future__ import annotations

import argparse
import fnmatch
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.shown_names import shown
from ssmpretrain.base.wording import few, nearest
from ssmpretrain.commands.compare.run_record import RunRecord, smaller_is_better
from ssmpretrain.commands.compare.settings import Settings, differing_settings
from ssmpretrain.commands.compare.table import FORMATS, Compared, render

_MOST_METRICS = 6  # without --metric
_MOST_SETTINGS = 8  # in text and Markdown, without --settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, e.g. runs/*")
    parser.add_argument(
        "--metric",
        nargs="+",
        metavar="NAME",
        help=f"metrics to show, e.g. val/mIoU or 'val/*' (default: the first {_MOST_METRICS} val/*, or train/loss). "
        "For each the last and the best value, and the steps before it; the best loss or error is the smallest",
    )
    parser.add_argument(
        "--settings",
        nargs="*",
        metavar="NAME",
        help=f"settings to show; none after the option hides all (default: those that differ, in text and Markdown the "
        f"first {_MOST_SETTINGS})",
    )
    parser.add_argument(
        "--sort",
        metavar="COLUMN",
        help="a metric (best values first), steps, parameters, run, or a setting (default: as named)",
    )
    parser.add_argument("--format", choices=FORMATS, default="text", help="(default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Print one row for each run: the settings in which the runs differ, steps, trained parameters and metrics."""
    records, notes = _read(args.runs)
    metrics = _chosen_metrics(records, args.metric, notes)
    settings = differing_settings([one.config for one in records])
    runs = [Compared(*pair) for pair in zip(records, settings, strict=True)]
    if args.sort is not None:
        runs = _sorted(runs, args.sort)
    most = None if args.format in ("csv", "json") else _MOST_SETTINGS
    names = _chosen_settings(settings, args.settings, most, notes)
    for one in runs:
        notes += _notes(one.record, metrics)
    print(render(runs, names, metrics, notes, args.format))
    if args.format == "csv":
        print(*notes, sep="\n", end="\n" if notes else "", file=sys.stderr)
    return 0


def _read(names: Sequence[str]) -> tuple[list[RunRecord], list[str]]:
    """Read the runs, each folder once; return them and a note for each that cannot be read."""
    found: dict[str, RunRecord] = {}
    notes: list[str] = []
    for name in names:
        path = Path(name).expanduser()
        _check_there(name, path)
        if (real := os.path.realpath(path)) in found:
            continue
        try:
            found[real] = RunRecord.read(name)
        except UserError as error:
            notes.append(f"left out: {shown(str(error))}{_runs_inside(path)}")
    if not found:
        raise UserError(
            "\n  ".join(["compare: a run is the folder that `fit` writes; got none that can be read", *notes])
        )
    return list(found.values()), notes


def _check_there(name: str, path: Path) -> None:
    if path.exists():
        return
    beside = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
    raise UserError(f"compare: no such run: {shown(name)}. {nearest(path.name, sorted(beside), 'Beside it')}")


def _runs_inside(path: Path) -> str:
    """Return a hint if a folder is none of a run but holds runs."""
    inside = sorted(str(one.parent) for one in path.glob("*/config.yaml")) if path.is_dir() else []
    return f" It holds {len(inside):,} runs: name them, as {path}/*." if inside else ""


def _chosen_metrics(records: Sequence[RunRecord], asked: Sequence[str] | None, notes: list[str]) -> list[str]:
    """Return the metrics to show; add a note if there are more."""
    known = list(dict.fromkeys(name for one in records for name in one.metrics))
    if asked:
        for name in asked:
            if not fnmatch.filter(known, name):
                raise UserError(
                    f"compare: --metric names a metric that a run has logged; got {name}. "
                    f"{nearest(name, known, 'The runs have') if known else 'The runs have logged none.'}"
                )
        return list(dict.fromkeys(found for name in asked for found in fnmatch.filter(known, name)))
    found = [name for name in known if name.startswith("val/")] or [name for name in known if name == "train/loss"]
    if rest := found[_MOST_METRICS:]:
        notes.append(f"with --metric also: {few(rest, 12)}")
    return found[:_MOST_METRICS]


def _chosen_settings(
    settings: Sequence[Settings], asked: Sequence[str] | None, most: int | None, notes: list[str]
) -> list[str]:
    """Return the settings to show; add a note if there are more than `most`."""
    known = list(dict.fromkeys(name for one in settings for name in one))
    for name in asked or ():
        if name not in known:
            hint = nearest(name, known, "These differ") if known else "No setting differs."
            raise UserError(f"compare: --settings names a setting in which the runs differ; got {name}. {hint}")
    if asked is not None:
        return list(dict.fromkeys(asked))
    if most is not None and (rest := known[most:]):
        notes.append(f"with --settings also: {few(rest, 12)}")
    return known[:most]


def _sorted(runs: Sequence[Compared], column: str) -> list[Compared]:
    """Sort the runs by a column; those that have nothing there come last, in their former order."""
    known = ["run", "steps", "parameters", *(name for one in runs for name in (*one.settings, *one.record.metrics))]
    if column not in known:
        raise UserError(f"compare: --sort names a column; got {column}. {nearest(column, known, 'The columns are')}")
    return sorted(runs, key=lambda one: _rank(one, column))


def _rank(one: Compared, column: str) -> tuple[int, float, str]:
    """Return a key to sort by: 0 for numbers, 1 for texts and 2 for runs without a value."""
    if (best := one.record.best(column)) is not None:
        return 0, best.value if smaller_is_better(column) else -best.value, ""
    own = {"run": one.record.name, "steps": one.record.steps, "parameters": one.record.parameters}
    value = {**own, **one.settings}.get(column)
    if isinstance(value, int | float):
        return 0, value, ""
    return (2, math.inf, "") if value is None else (1, 0.0, str(value))


def _notes(record: RunRecord, metrics: Sequence[str]) -> list[str]:
    """Return remarks on a run that is not finished, lacks metrics, or ends in a value that is not finite."""
    name = shown(record.name)
    notes = [] if record.state == "finished" else [f"{name}: not finished: {record.state}, step {record.steps:,}"]
    if not record.metrics:
        notes.append(f"{name}: no metrics: its metrics.jsonl is missing or empty")
    elif not any(record.points(metric) for metric in metrics):
        notes.append(f"{name}: none of these metrics; it has {few(record.metrics, 8)}")
    lost = [metric for metric in metrics if record.ends_without(metric)]
    return [*notes, *(f"{name}: the last {metric} is not a finite number; shown is the one before" for metric in lost)]
