"""Schedules of learning rate and weight decay, stepped once per optimizer step."""

from __future__ import annotations

import bisect
import logging
import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch.optim.lr_scheduler import LambdaLR

from ssmpretrain.base.errors import UserError
from ssmpretrain.training.optim.ramps import Ramp
from ssmpretrain.training.settings import Settings

_log = logging.getLogger(__name__)
Factor = Callable[[float], float]
_ROUNDING = 1e-6  # epochs; the place of a continued run with another batch is a quotient


@dataclass
class Schedule(Settings):
    """Base class of schedules. A schedule is a factor on the peak learning rate for every optimizer step.

    Subclasses are dataclasses of plain data, and define `over`. A recipe names the class, for example
    `schedule: {class_path: ssmpretrain.training.optim.Poly, init_args: {power: 0.9}}`.
    """

    unnamed: ClassVar[str] = "Cosine"

    @abstractmethod
    def over(self, total_steps: int, steps_per_epoch: float) -> Factor:
        """Return the function that maps a place in the run, in steps from 0, to the factor.

        Args:
            total_steps: Optimizer steps of the whole run.
            steps_per_epoch: Optimizer steps per epoch.
        """

    def build(
        self, optimizer: torch.optim.Optimizer, total_steps: int, steps_per_epoch: float, *, in_epochs: bool = False
    ) -> FactorLR:
        """Build the scheduler of a run.

        Args:
            optimizer: Optimizer with the peak learning rates.
            total_steps: Optimizer steps of the whole run.
            steps_per_epoch: Optimizer steps per epoch.
            in_epochs: Whether the run ends after a number of epochs, rather than a number of steps.
        """
        return FactorLR(optimizer, self.over(total_steps, steps_per_epoch), total_steps, steps_per_epoch, in_epochs)


@dataclass
class Cosine(Schedule):
    """Linear warm-up from `initial_fraction` of the peak, then half a cosine down to `final_fraction` of it.

    With both fractions 1 the learning rate is constant. A warm-up that is longer than the run is cut to its length.

    Args:
        warmup_epochs: Length of the warm-up in epochs (may be a fraction), at least 0.
        final_fraction: Learning rate at the end, as a fraction of the peak, in [0, 1].
        warmup_prefix: Whether the cosine begins when the warm-up ends. Otherwise the cosine begins with the run, and
            the warm-up replaces its first part. timm has the same option, with False as default.
        initial_fraction: Learning rate at the start of the warm-up, as a fraction of the peak, in [0, 1]. The first
            optimizer step is already one step above it.
        by_epoch: Whether the cosine moves only when an epoch begins, as in the linear probe of DINO. The warm-up
            moves in every step.

    Source: Loshchilov & Hutter, "SGDR" (arXiv:1608.03983); warm-up as in He et al. (arXiv:2111.06377), table 8.
    """

    warmup_epochs: float = 40
    final_fraction: float = 0.0
    initial_fraction: float = 0.0
    warmup_prefix: bool = True
    by_epoch: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_epochs < math.inf:
            raise UserError(f"Cosine: warmup_epochs is finite and at least 0; got {self.warmup_epochs}. Correct it.")
        _check_fractions(self, "final_fraction", "initial_fraction")

    def factor(self, step: float, total_steps: int, warmup_steps: int) -> float:
        """Compute the learning rate at `step` (from 0), as a fraction of the peak."""
        if step < warmup_steps:
            return _warm_up(step, warmup_steps, self.initial_fraction)
        start = warmup_steps if self.warmup_prefix else 0
        progress = min(1.0, (step - start) / max(1, total_steps - start))
        return self.final_fraction + (1 - self.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))

    def over(self, total_steps: int, steps_per_epoch: float) -> Factor:
        warmup_steps = min(round(self.warmup_epochs * steps_per_epoch), total_steps)

        def factor(step: float) -> float:
            if self.by_epoch and step >= warmup_steps:
                epochs = math.floor(step / steps_per_epoch + _ROUNDING)
                step = max(epochs * steps_per_epoch, warmup_steps)
            return self.factor(step, total_steps, warmup_steps)

        return factor


@dataclass
class _WarmedUp(Schedule):
    """Base class of schedules whose linear warm-up, given in steps or in epochs, multiplies the factor `decay`."""

    warmup_steps: int = field(default=0, kw_only=True)
    warmup_epochs: float = field(default=0.0, kw_only=True)
    initial_fraction: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        where = type(self).__name__
        for name in ("warmup_steps", "warmup_epochs"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{where}: {name} is finite and at least 0; got {getattr(self, name)}. Correct it.")
        if self.warmup_steps and self.warmup_epochs:
            raise UserError(
                f"{where}: the warm-up is given in steps or in epochs; got warmup_steps {self.warmup_steps} and "
                f"warmup_epochs {self.warmup_epochs}. Set one of them to 0."
            )
        _check_fractions(self, "initial_fraction")

    def warm_up_over(self, total_steps: int, steps_per_epoch: float) -> int:
        """Return the length of the warm-up in steps. One that is longer than the run is cut to its length."""
        steps = self.warmup_steps or round(self.warmup_epochs * steps_per_epoch)
        if steps >= total_steps and self.initial_fraction < 1:
            rank_zero_only(_log.warning)(
                "%s: the warm-up of %d steps fills the run of %d, so the learning rate only rises; set "
                "schedule.warmup_steps", type(self).__name__, steps, total_steps,
            )  # fmt: skip
        return min(steps, total_steps)


@dataclass
class Poly(_WarmedUp):
    """Linear warm-up, then `(1 - t)^power` down to `final_fraction` of the peak; t goes from 0 to 1.

    Args:
        power: Exponent, above 0; 1 is a straight line.
        warmup_steps: Length of the warm-up in optimizer steps, at least 0.
        warmup_epochs: Length of the warm-up in epochs (may be a fraction), instead of `warmup_steps`.
        initial_fraction: Learning rate at the start of the warm-up, as a fraction of the peak, in [0, 1]. The first
            optimizer step is already one step above it.
        final_fraction: Learning rate at the end, as a fraction of the peak, in [0, 1].
        warmup_prefix: Whether t counts from the end of the warm-up, as in mmengine (mmsegmentation 1). Otherwise t
            counts from the start of the run, and the warm-up multiplies the decay, as in mmcv (mmsegmentation 0).

    Source: Chen et al., "DeepLab" (arXiv:1606.00915), section 4.1.2; mmengine's LinearLR and PolyLR.
    """

    power: float = 1.0
    final_fraction: float = field(default=0.0, kw_only=True)
    warmup_prefix: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.power < math.inf:
            raise UserError(f"Poly: power is finite and above 0; got {self.power}. 1 and 0.9 are usual.")
        _check_fractions(self, "final_fraction")

    def over(self, total_steps: int, steps_per_epoch: float) -> Factor:
        warmup_steps = self.warm_up_over(total_steps, steps_per_epoch)
        start = warmup_steps if self.warmup_prefix else 0

        def factor(step: float) -> float:
            left = 1 - min(1.0, max(0.0, step - start) / max(1, total_steps - start))
            decay: float = self.final_fraction + (1 - self.final_fraction) * left**self.power
            return decay * _warm_up(step, warmup_steps, self.initial_fraction)

        return factor


@dataclass
class Steps(_WarmedUp):
    """Linear warm-up to the peak; the learning rate is multiplied by `gamma` at every milestone.

    Args:
        milestone_epochs: Epochs after which the rate falls, ascending, each above 0 (mmdetection: [8, 11]).
        milestone_steps: Optimizer steps after which the rate falls, instead of `milestone_epochs` (detectron2).
        gamma: Factor at a milestone, in (0, 1].
        warmup_steps: Length of the warm-up in optimizer steps, at least 0.
        warmup_epochs: Length of the warm-up in epochs (may be a fraction), instead of `warmup_steps`.
        initial_fraction: Learning rate at the start of the warm-up, as a fraction of the peak, in [0, 1]. The first
            optimizer step is already one step above it.

    Raises:
        UserError: If an argument is out of range, or if not exactly one list of milestones is given.
    """

    milestone_epochs: list[float] = field(default_factory=list)
    milestone_steps: list[int] = field(default_factory=list)
    gamma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.milestone_epochs) == bool(self.milestone_steps):
            got = "both" if self.milestone_steps else "none"
            raise UserError(
                "Steps: milestones are in epochs or in steps; got "
                f"{got}. Set milestone_epochs, e.g. [8, 11], or milestone_steps, e.g. [163889, 177546]."
            )
        for name in ("milestone_epochs", "milestone_steps"):
            places = getattr(self, name)
            rising = all(before < after for before, after in zip([0, *places], places, strict=False))
            if not rising or not all(map(math.isfinite, places)):
                raise UserError(f"Steps: {name} are above 0 and ascending; got {places}. Correct them.")
        if not 0 < self.gamma <= 1:
            raise UserError(f"Steps: gamma is a factor in (0, 1]; got {self.gamma}. 0.1 is usual.")

    def over(self, total_steps: int, steps_per_epoch: float) -> Factor:
        warmup_steps = self.warm_up_over(total_steps, steps_per_epoch)
        places = [float(step) for step in self.milestone_steps]
        places = places or [epoch * steps_per_epoch for epoch in self.milestone_epochs]
        if late := [place for place in places if place >= total_steps]:
            rank_zero_only(_log.warning)(
                "Steps: %d of %d milestones are not reached, since the run ends after %d steps, and the first of them "
                "is at step %g", len(late), len(places), total_steps, late[0],
            )  # fmt: skip
        return lambda step: (
            self.gamma ** bisect.bisect_right(places, step) * _warm_up(step, warmup_steps, self.initial_fraction)
        )


def _warm_up(step: float, warmup_steps: int, initial_fraction: float) -> float:
    """Return the factor of a linear warm-up, which is 1 from its last step on."""
    if step >= warmup_steps:
        return 1.0
    return initial_fraction + (1 - initial_fraction) * (step + 1) / warmup_steps


def _check_fractions(schedule: Schedule, *names: str) -> None:
    for name in names:
        if not 0 <= (got := getattr(schedule, name)) <= 1:
            raise UserError(f"{type(schedule).__name__}: {name} is a fraction in [0, 1]; got {got}. Correct it.")


class FactorLR(LambdaLR):
    """Multiply the learning rate of each group by a factor that depends on the step.

    A group with the keys "initial_weight_decay" and "final_weight_decay" has a weight decay that moves from the one to
    the other over the run, by half a cosine.

    From a checkpoint the scheduler takes only its place in the schedule; rates and shape are those it was built with.
    If the run ends after a number of epochs and the steps per epoch have changed, e.g. by another global batch, the
    place stays the same in epochs.

    Args:
        optimizer: Optimizer with the peak learning rates.
        factor: Maps a place in steps, from 0, to a factor.
        total_steps: Optimizer steps of the whole run.
        steps_per_epoch: Optimizer steps per epoch.
        in_epochs: Whether the run ends after a number of epochs, rather than a number of steps.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        factor: Callable[[float], float],
        total_steps: int,
        steps_per_epoch: float,
        in_epochs: bool,
    ) -> None:
        self.total_steps, self.steps_per_epoch, self.in_epochs = total_steps, steps_per_epoch, in_epochs
        self.ahead: float = 0  # place in the schedule minus the steps that the optimizer has taken
        super().__init__(optimizer, lambda step: factor(step + self.ahead))

    @property
    def place(self) -> float:
        """Place in the schedule, in steps from 0: the steps taken, or more or less if the epochs have changed."""
        return self.last_epoch + self.ahead

    def step(self, epoch: int | None = None) -> None:
        super().step(epoch)
        self._move_weight_decay()

    def _move_weight_decay(self) -> None:
        for group in self.optimizer.param_groups:
            if "final_weight_decay" in group:
                ramp = Ramp(group["initial_weight_decay"], group["final_weight_decay"])
                group["weight_decay"] = ramp.at(self.place, self.total_steps, self.steps_per_epoch)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the place that the state holds.

        Raises:
            ValueError: If the state holds no valid place.
        """
        steps: Any = state_dict.get("last_epoch")
        ahead = state_dict.get("ahead", 0)
        before = state_dict.get("steps_per_epoch", self.steps_per_epoch)
        whole = type(steps) is int and steps >= 0
        if not (whole and _is_finite(ahead) and steps + ahead >= 0 and _is_finite(before) and before > 0):
            raise UserError(
                "schedule: a place is a whole number of steps, at least 0, in epochs of more than 0 steps; the "
                f"checkpoint has last_epoch {steps!r:.40}, ahead {ahead!r:.40}, steps_per_epoch {before!r:.40}. "
                "Give an earlier checkpoint, or start a new run from its weights, with model.init_from."
            )
        if self.in_epochs and before != self.steps_per_epoch:
            ahead = (steps + ahead) * self.steps_per_epoch / before - steps
        kept = {name: getattr(self, name) for name in ("base_lrs", "total_steps", "steps_per_epoch", "in_epochs")}
        super().load_state_dict({**state_dict, **kept, "ahead": ahead})
        self._last_lr = [rate * factor(steps) for rate, factor in zip(self.base_lrs, self.lr_lambdas, strict=True)]
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = lr
        self._move_weight_decay()


def _is_finite(number: Any) -> bool:
    return isinstance(number, int | float) and math.isfinite(number)
