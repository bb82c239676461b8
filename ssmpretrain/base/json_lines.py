"""JSON lines: files with one object per line, readable even if a kill, a full disk or an edit damaged some lines."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeGuard

from ssmpretrain.base.whole_files import append, damaged_path, move_aside_unless_regular, opened, replacing

_log = logging.getLogger(__name__)
Row = dict[str, Any]
_LARGEST = 1e300  # a larger number is damage, and cannot be drawn


class RowFile:
    """File to which rows are appended, all or none. Rows that a full disk refuses wait in memory for the next call.

    Args:
        path: The file; the first row creates it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[str] = []
        self._failed = False

    def append(self, rows: Iterable[str]) -> None:
        """Append rows, each the text of a JSON object, after the rows that wait."""
        self._waiting += rows
        if not self._waiting:
            return
        try:
            append(self.path, "".join(f"{row}\n" for row in self._waiting).encode())
        except OSError as error:
            if not self._failed:
                _log.warning("%s: not written: %s; its rows wait until they can be", self.path, error.strerror)
            self._failed = True
        else:
            self._failed = False
            self._waiting.clear()


def read_rows(path: Path, is_row: Callable[[Row], bool] = bool) -> list[Row]:
    """Return the rows of a file without its damaged lines; an empty list if there is no file.

    Args:
        path: The file.
        is_row: Says whether an object is a row of this file.
    """
    try:
        return [row for _, row in _lines(path, is_row) if row is not None]
    except FileNotFoundError:
        return []
    except OSError as error:
        _log.warning("%s: not read: %s", path, error.strerror)
        return []


def mend_rows(path: Path, keep: Callable[[Row], bool] = bool, is_row: Callable[[Row], bool] = bool) -> None:
    """Drop rows, and an unfinished last line, from a file; move damaged lines to `NAME.damaged`.

    Args:
        path: The file. If there is none, nothing is done.
        keep: Says whether a row stays.
        is_row: Says whether an object is a row of this file.

    Raises:
        OSError: If the file cannot be read or written; then it has not changed.
    """
    move_aside_unless_regular(path)
    damaged: list[bytes] = []
    kept: list[bytes] = []
    changed = False
    for line, row in _lines(path, is_row) if path.exists() else ():
        if row is not None and keep(row):
            kept.append(line if line.endswith(b"\n") else line + b"\n")
            changed |= kept[-1] != line
            continue
        changed = True
        if row is None and line.endswith(b"\n"):
            damaged.append(line)
    if not changed:
        return
    if damaged:
        aside = damaged_path(path)
        append(aside, b"".join(damaged))
        many = f"{len(damaged):,} damaged line{'s' * (len(damaged) != 1)}"
        _log.warning("%s: %s set aside in %s", path, many, aside.name)
    with replacing(path) as file:
        file.writelines(kept)


def series(rows: Iterable[Row], name: str) -> list[tuple[float, float]]:
    """Return (step, value) of every row that has a number of this name."""
    found = ((row.get("step"), row.get(name)) for row in rows)
    return [(step, value) for step, value in found if _is_number(step) and _is_number(value)]


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and -_LARGEST < value < _LARGEST


def _lines(path: Path, is_row: Callable[[Row], bool]) -> Iterator[tuple[bytes, Row | None]]:
    """Yield each line, its end included, with the row in it; None if the line is damaged."""
    with opened(path) as file:
        for line in file:
            yield line, _row(line, is_row)


def _row(line: bytes, is_row: Callable[[Row], bool]) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # ValueError includes errors of the encoding
        return None
    return row if isinstance(row, dict) and is_row(row) else None


def drop_rows(metrics: Path, step: int) -> None:
    """Drop the rows of `metrics.jsonl` that follow `step` optimizer steps, and repair the file."""
    mend_rows(metrics, lambda row: not isinstance(row.get("step"), int) or row["step"] < step)  # after step 1 it is 0
