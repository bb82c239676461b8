"""Learning-rate schedules, stepped once per optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import LambdaLR


@dataclass
class Cosine:
    """Linear warm-up from `initial_fraction` of the peak, then half a cosine down to `final_fraction` of it.

    With both fractions 1 the learning rate is constant.

    Args:
        warmup_epochs: Length of the warm-up in epochs (may be a fraction), at least 0.
        final_fraction: Learning rate at the end, as a fraction of the peak, in [0, 1].
        warmup_prefix: Whether the cosine begins where the warm-up ends; else it begins with the run, and the warm-up
            takes the place of its start (timm's word, and there False by default).
        initial_fraction: Learning rate that the warm-up rises from, as a fraction of the peak, in [0, 1]. The first
            step is already one step above it.

    Source: Loshchilov & Hutter, "SGDR" (arXiv:1608.03983); warm-up as in He et al. (arXiv:2111.06377), table 8.
    """

    warmup_epochs: float = 40
    final_fraction: float = 0.0
    initial_fraction: float = 0.0
    warmup_prefix: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_epochs < math.inf:
            raise ValueError(f"Cosine: warmup_epochs is finite and at least 0; got {self.warmup_epochs}")
        for name in ("final_fraction", "initial_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Cosine: {name} is a fraction in [0, 1]; got {getattr(self, name)}")

    def factor(self, step: int, total_steps: int, warmup_steps: int) -> float:
        """Learning rate at `step` (from 0), as a fraction of the peak."""
        if step < warmup_steps:
            return self.initial_fraction + (1 - self.initial_fraction) * (step + 1) / warmup_steps
        start = warmup_steps if self.warmup_prefix else 0
        progress = min(1.0, (step - start) / max(1, total_steps - start))
        return self.final_fraction + (1 - self.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))

    def build(self, optimizer: torch.optim.Optimizer, total_steps: int, steps_per_epoch: float) -> LambdaLR:
        """Scheduler for `total_steps` optimizer steps; a warm-up longer than the run is cut to the run."""
        warmup_steps = min(round(self.warmup_epochs * steps_per_epoch), total_steps)
        return LambdaLR(optimizer, lambda step: self.factor(step, total_steps, warmup_steps))
