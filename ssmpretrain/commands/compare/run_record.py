"""The record of one run: its configuration, its metrics, its length, and whether it is finished."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.json_lines import Row, read_rows, series
from ssmpretrain.base.run_config import read_config
from ssmpretrain.base.run_folder import RunFolder
from ssmpretrain.training.checkpoints.folder import by_step, read_state, step_of

_EPOCHS = 1000  # Lightning's max_epochs if neither max_epochs nor max_steps is set
# Words in the names of metrics whose best value is the smallest.
_SMALLER_IS_BETTER = ("loss", "error", "perplexity", "bad_samples", "time", "seconds", "memory")


class Point(NamedTuple):
    """A value of a metric, and the optimizer steps that had been taken when it was logged."""

    value: float
    step: int


@dataclass(frozen=True)
class RunRecord:
    """The files of one run folder that `compare` needs.

    Attributes:
        name: The folder, as the user named it.
        config: Configuration of the run, as `read_config` returns it.
        rows: Rows of `metrics.jsonl`, in the order in which they were written.
        steps: Optimizer steps that the run has taken.
        state: "finished", or the reason why the run is not.
        parameters: Number of trained parameters; None if the run has not noted them.
    """

    name: str
    config: dict[str, Any]
    rows: list[Row]
    steps: int
    state: str
    parameters: int | None

    @classmethod
    def read(cls, name: str) -> RunRecord:
        """Read the run folder `name`.

        Raises:
            UserError: If the folder holds no configuration of a run.
        """
        folder = RunFolder(Path(name).expanduser())
        config, rows = read_config(folder.config), read_rows(folder.metrics)
        checkpoints = by_step(folder.checkpoints)
        saved = (step_of(checkpoints[0]) or 0) if checkpoints else 0
        logged = [row["step"] + 1 for row in rows if isinstance(row.get("step"), int)]  # the first row has step 0
        state = _state(config, checkpoints[0], saved) if checkpoints else "without a checkpoint"
        return cls(name, config, rows, max([saved, *logged]), state, _parameters(folder.parameter_groups))

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics that have a finite value, in the order of the rows."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        return [name for name in names if name not in ("step", "time", "epoch") and self.points(name)]

    def points(self, metric: str) -> list[Point]:
        """Return all finite values of a metric."""
        return [Point(value, int(step) + 1) for step, value in series(self.rows, metric)]

    def last(self, metric: str) -> Point | None:
        """Return the last finite value of a metric; None if there is none."""
        return next(reversed(self.points(metric)), None)

    def best(self, metric: str) -> Point | None:
        """Return the best value of a metric, the earliest of equal ones; None if there is none."""
        sign = -1 if smaller_is_better(metric) else 1
        return max(self.points(metric), key=lambda point: sign * point.value, default=None)

    def ends_without(self, metric: str) -> bool:
        """Return whether the last value of a metric that the run wrote is not a finite number."""
        written = [row[metric] for row in self.rows if metric in row]
        return bool(written) and written[-1] is None


def smaller_is_better(metric: str) -> bool:
    """Return whether the best value of a metric is the smallest: of losses and errors, say."""
    return any(word in metric.lower() for word in _SMALLER_IS_BETTER)


def _state(config: dict[str, Any], newest: Path, saved: int) -> str:
    """Return whether the checkpoint `newest`, after `saved` steps, is the end of the run, in words."""
    trainer = config.get("trainer") or {}
    most_steps, most_epochs = _limit(trainer.get("max_steps")), _limit(trainer.get("max_epochs"))
    if saved >= most_steps:
        return "finished"
    if most_steps == most_epochs == math.inf and trainer.get("max_epochs") is None:
        most_epochs = _EPOCHS
    from ssmpretrain.base.lightning_private import finished_epochs, has_loop_counts  # Lightning takes seconds to import

    try:
        content = read_state(newest, is_inspected=True)
    except (UserError, OSError):
        return f"with a checkpoint that cannot be read ({newest.name})"
    if not isinstance(content, dict) or not has_loop_counts(content):
        return f"with a checkpoint that no run has written ({newest.name})"
    if content.get("stopped_early"):
        return "finished"
    return "finished" if finished_epochs(content) >= most_epochs else "unfinished"


def _limit(value: Any) -> float:
    """Return a limit of the trainer as a number; without one, infinity."""
    return value if isinstance(value, int) and value >= 0 else math.inf


def _parameters(table: Path) -> int | None:
    """Sum the column of parameters in `parameter_groups.txt`; None if there is no such table."""
    try:
        lines = table.read_text().partition("\n\n")[0].splitlines()
        return sum(int(line.split()[-1].replace(",", "")) for line in lines[1:]) if lines else None
    except (OSError, ValueError, IndexError):
        return None
