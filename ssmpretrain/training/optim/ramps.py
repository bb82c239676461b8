"""Ramps: numbers that move during a run, such as the momentum of a teacher, a temperature or the weight decay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ssmpretrain.base.errors import UserError

Shape = Literal["cosine", "linear"]


@dataclass
class Ramp:
    """A number that moves from `start` to `end`, by optimizer steps, and then stays.

    At step i of N, counted from 0, the value is `start + (end - start) * (1 - cos(pi i / N)) / 2` or, as a straight
    line, `start + (end - start) * i / N`. The cosine equals DINO's `cosine_scheduler`: the first step has `start`, the
    last one is one step short of `end`. DINO's teacher temperature goes up in stairs, one per epoch; the line goes up
    in each step, as in DINOv2.

    A run that continues with another global batch or length keeps its place in epochs, as the learning rate does, see
    `FactorLR`.

    Args:
        start: Value at the first step, finite.
        end: Value at the end of the ramp, finite; equal to `start` for a constant.
        shape: "cosine" for half a cosine, "linear" for a straight line.
        epochs: Length in epochs (may be a fraction), above 0; None is the length of the run.

    Raises:
        UserError: If an argument is out of range.
    """

    start: float
    end: float
    shape: Shape = "cosine"
    epochs: float | None = None

    def __post_init__(self) -> None:
        if self.shape not in get_args(Shape):
            raise UserError(f"Ramp: shape is {' or '.join(get_args(Shape))}; got {self.shape!r}.")
        if not (math.isfinite(self.start) and math.isfinite(self.end)):
            raise UserError(f"Ramp: start and end are finite; got {self.start} and {self.end}.")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise UserError(f"Ramp: epochs is finite and above 0; got {self.epochs}. Null is the whole run.")

    def at(self, step: float, total_steps: int, steps_per_epoch: float) -> float:
        """Return the value at a step, counted from 0.

        Args:
            step: Optimizer steps that were taken.
            total_steps: Optimizer steps of the whole run.
            steps_per_epoch: Optimizer steps per epoch.
        """
        length = total_steps if self.epochs is None else self.epochs * steps_per_epoch
        progress = min(1.0, step / max(1.0, length))
        if self.shape == "cosine":
            progress = 0.5 * (1 - math.cos(math.pi * progress))
        return self.start + (self.end - self.start) * progress

    def __str__(self) -> str:
        if self.start == self.end:
            return f"{self.start:g}"
        way = {"cosine": "by half a cosine", "linear": "on a line"}[self.shape]
        length = "over the run" if self.epochs is None else f"over {self.epochs:g} epoch{'s' * (self.epochs != 1)}"
        return f"{self.start:g} to {self.end:g} {way} {length}"
