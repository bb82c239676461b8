"""Collapse: stop a run whose features no longer tell images apart, which its loss alone does not show."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch.optim import Optimizer

from ssmpretrain.base import ranks
from ssmpretrain.base.errors import UserError
from ssmpretrain.training.stopping.non_finite import TrainingDiverged

_log = logging.getLogger(__name__)
_INTERVAL = 50  # optimizer steps between two looks in a run that logs no steps
_SHARE = 0.1  # default patience, as a share of the run
_LEAST = 200  # and at least so many steps
Side = Literal["above", "below"]


@dataclass(frozen=True)
class CollapseLimit:
    """A bound of a logged number; a run whose number stays beyond it has collapsed.

    Args:
        gauge: Name under which the objective logs the number in training, such as `train/teacher_entropy`.
        bound: The bound, in the unit of the gauge. A gauge that equals it is beyond it.
        side: Whether the gauge is at least the bound ("above") or at most the bound ("below") in a collapsed run.
        meaning: The kind of collapse, as a clause: "the teacher gives all prototypes the same probability".
        remedy: Settings to change, as one or more sentences that begin with a verb.

    Raises:
        UserError: If `side` is neither "above" nor "below".
    """

    gauge: str
    bound: float
    side: Side
    meaning: str
    remedy: str

    def __post_init__(self) -> None:
        if self.side not in get_args(Side):
            raise UserError(f"CollapseLimit: side is above or below; got {self.side!r}. Correct it for {self.gauge}.")

    def is_passed(self, value: float) -> bool:
        """Return whether a value of the gauge is at the bound or beyond it. A value that is not a number is not."""
        return value >= self.bound if self.side == "above" else value <= self.bound

    def describe(self) -> str:
        """Return the condition in words, to follow "has been"."""
        return f"at {'least' if self.side == 'above' else 'most'} {self.bound:.4g}"


class CollapseGuard(Callback):
    """Stop a run that has collapsed: one of its gauges has stayed beyond its limit for a number of optimizer steps.

    The objective names the gauges and their limits by `collapse_limits()`. Some of them are passed at the start of a
    healthy run too: with fresh weights all images have similar features. So a warning comes only after half of the
    patience, and the run stops after all of it. A gauge that leaves its limit once starts the count again.

    The guard looks in the steps whose numbers are logged, every `trainer.log_every_n_steps` (every 50 if no steps are
    logged), at the mean over ranks, so all ranks decide alike and other steps cost nothing. The counts are in
    checkpoints: a continued run stops where the uninterrupted one would.

    `DINO` and `LeJEPA` add this callback themselves. Name it in `trainer.callbacks` to set its patience. With an
    objective that has no `collapse_limits` it warns and does nothing.

    Args:
        patience: Optimizer steps beyond a limit that stop the run, at least 1. None is a tenth of the run, at least 200
            steps. Infinity (`.inf`) never stops and never warns.

    Raises:
        TrainingDiverged: When the patience is over. The message names the kind of collapse, and the settings to change.
    """

    observes_only = True

    def __init__(self, patience: float | None = None) -> None:
        if patience is not None and not patience >= 1:
            raise UserError(
                f"CollapseGuard: patience is at least 1 step; got {patience}. Leave it out for the default."
            )
        self.patience = patience
        self._since: dict[str, int] = {}  # limits that are passed now, and the step that first found them so
        self._warned: set[str] = set()
        self._limits: list[CollapseLimit] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ask = getattr(pl_module, "collapse_limits", None)
        self._limits = list(ask()) if callable(ask) else []
        if not callable(ask):
            rank_zero_only(_log.warning)(
                "CollapseGuard has no effect, because %s has no collapse_limits(). Leave it out of trainer.callbacks.",
                type(pl_module).__name__,
            )
        self._patience = self.patience or max(_LEAST, round(_SHARE * trainer.estimated_stepping_batches))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not self._limits or not gauges_are_due(trainer):
            return
        logged = trainer.callback_metrics
        limits = [limit for limit in self._limits if limit.gauge in logged]
        if limits:
            values = torch.stack([logged[limit.gauge].detach().float() for limit in limits])
            for limit, value in zip(limits, (ranks.total(values) / ranks.world()).tolist(), strict=True):
                self._judge(limit, value, trainer.global_step + 1)

    def _judge(self, limit: CollapseLimit, value: float, step: int) -> None:
        name = f"{limit.gauge} {limit.side}"
        if not limit.is_passed(value):
            self._since.pop(name, None)
            self._warned.discard(name)
            return
        passed = step - self._since.setdefault(name, step)
        facts = f"{limit.gauge} is {value:.4g} and has been {limit.describe()} for {passed:,} steps: {limit.meaning}"
        if passed >= self._patience:
            raise TrainingDiverged(
                f"step {step}: the run has collapsed. {facts}. {limit.remedy} Then start a new run. If the run should "
                "go on for longer, set the patience of ssmpretrain.training.CollapseGuard in trainer.callbacks."
            )
        if passed >= self._patience / 2 and name not in self._warned:
            self._warned.add(name)
            stop = self._since[name] + self._patience
            rank_zero_only(_log.warning)(
                "step %d: %s. Unless that changes, the run stops at step %d.", step, facts, stop
            )

    def state_dict(self) -> dict[str, Any]:
        return {"since": dict(self._since)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._since = dict(state_dict["since"])


def gauges_are_due(trainer: Trainer) -> bool:
    """Return whether the present optimizer step measures the gauges that are too dear for every step.

    These are the steps whose numbers are logged, and every 50th if no steps are logged.
    """
    return (trainer.global_step + 1) % (trainer.log_every_n_steps or _INTERVAL) == 0  # type: ignore[attr-defined]
