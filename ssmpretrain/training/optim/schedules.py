"""Learning-rate schedules, stepped once per optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from ssmpretrain.base.errors import UserError


@dataclass
class Cosine:
    """Linear warm-up from `initial_fraction` of the peak, then half a cosine down to `final_fraction` of it.

    With both fractions 1 the learning rate is constant.

    Args:
        warmup_epochs: Length of the warm-up in epochs (may be a fraction), at least 0.
        final_fraction: Learning rate at the end, as a fraction of the peak, in [0, 1].
        warmup_prefix: Whether the cosine begins when the warm-up ends. Otherwise the cosine begins with the run, and
            the warm-up replaces its first part. timm has the same option, with False as default.
        initial_fraction: Learning rate at the start of the warm-up, as a fraction of the peak, in [0, 1]. The first
            optimizer step is already one step above it.

    Source: Loshchilov & Hutter, "SGDR" (arXiv:1608.03983); warm-up as in He et al. (arXiv:2111.06377), table 8.
    """

    warmup_epochs: float = 40
    final_fraction: float = 0.0
    initial_fraction: float = 0.0
    warmup_prefix: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_epochs < math.inf:
            raise UserError(f"Cosine: warmup_epochs is finite and at least 0; got {self.warmup_epochs}. Correct it.")
        for name in ("final_fraction", "initial_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"Cosine: {name} is a fraction in [0, 1]; got {getattr(self, name)}. Correct it.")

    def factor(self, step: float, total_steps: int, warmup_steps: int) -> float:
        """Compute the learning rate at `step` (from 0), as a fraction of the peak."""
        if step < warmup_steps:
            return self.initial_fraction + (1 - self.initial_fraction) * (step + 1) / warmup_steps
        start = warmup_steps if self.warmup_prefix else 0
        progress = min(1.0, (step - start) / max(1, total_steps - start))
        return self.final_fraction + (1 - self.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))

    def build(
        self, optimizer: torch.optim.Optimizer, total_steps: int, steps_per_epoch: float, *, in_epochs: bool = False
    ) -> FactorLR:
        """Build the scheduler of a run. A warm-up that is longer than the run is cut to the length of the run.

        Args:
            optimizer: Optimizer with the peak learning rates.
            total_steps: Optimizer steps of the whole run.
            steps_per_epoch: Optimizer steps per epoch.
            in_epochs: Whether the run ends after a number of epochs, rather than a number of steps.
        """
        warmup_steps = min(round(self.warmup_epochs * steps_per_epoch), total_steps)
        return FactorLR(
            optimizer, lambda step: self.factor(step, total_steps, warmup_steps), steps_per_epoch, in_epochs
        )


class FactorLR(LambdaLR):
    """Multiply the learning rate of each group by a factor that depends on the step.

    From a checkpoint the scheduler takes only its place in the schedule; rates and shape are those it was built with.
    If the run ends after a number of epochs and the steps per epoch have changed, e.g. by another global batch, the
    place stays the same in epochs.

    Args:
        optimizer: Optimizer with the peak learning rates.
        factor: Maps a place in steps, from 0, to a factor.
        steps_per_epoch: Optimizer steps per epoch.
        in_epochs: Whether the run ends after a number of epochs, rather than a number of steps.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        factor: Callable[[float], float],
        steps_per_epoch: float,
        in_epochs: bool,
    ) -> None:
        self.steps_per_epoch, self.in_epochs = steps_per_epoch, in_epochs
        self.ahead: float = 0  # place in the schedule minus the steps that the optimizer has taken
        super().__init__(optimizer, lambda step: factor(step + self.ahead))

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
        kept = {name: getattr(self, name) for name in ("base_lrs", "steps_per_epoch", "in_epochs")}
        super().load_state_dict({**state_dict, **kept, "ahead": ahead})
        self._last_lr = [rate * factor(steps) for rate, factor in zip(self.base_lrs, self.lr_lambdas, strict=True)]
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = lr


def _is_finite(number: Any) -> bool:
    return isinstance(number, int | float) and math.isfinite(number)
