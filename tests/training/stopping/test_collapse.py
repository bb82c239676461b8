"""A collapsed run stops, with its kind and the remedy; a run that recovers, or is slow to start, does not."""

import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from ssmpretrain.base.errors import UserError
from ssmpretrain.objectives import LeJEPA
from ssmpretrain.training.stopping.collapse import CollapseGuard, CollapseLimit, TrainingDiverged

STEPS = 40


class Gauged(LightningModule):
    """Logs a number of its own in each step, and counts as collapsed while it is at most 1."""

    def __init__(self, gauge: Sequence[float]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.gauge = gauge

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("train/entropy", self.gauge[self.trainer.global_step])
        return self.weight * batch.mean()

    def collapse_limits(self) -> list[CollapseLimit]:
        return [
            CollapseLimit("train/entropy", 1.0, "below", "one prototype takes all images", "Raise the temperature."),
            CollapseLimit("train/never_logged", 1.0, "above", "nothing", "Do nothing."),
        ]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    gauge: Sequence[float],
    guard: CollapseGuard,
    interval: int = 1,
    accumulate: int = 1,
    epochs: int = 1,
    file: Path | None = None,
    **options: Any,
) -> int:
    """Train on the numbers of a gauge, one per step; return the number of steps. Save a checkpoint."""
    trainer = Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=[guard], logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=interval,
        accumulate_grad_batches=accumulate,
    )  # fmt: skip
    trainer.fit(Gauged(gauge), DataLoader(torch.ones(len(gauge) * accumulate), batch_size=1), **options)
    if file:
        trainer.save_checkpoint(file)
    return trainer.global_step


def test_a_gauge_beyond_its_limit_warns_and_then_stops_the_run(caplog: pytest.LogCaptureFixture) -> None:
    gauge = [5.0] * 9 + [0.5] * (STEPS - 9)  # passed from the tenth step on
    with pytest.raises(TrainingDiverged) as stopped:
        fit(gauge, CollapseGuard(patience=20))
    assert str(stopped.value) == (
        "step 30: the run has collapsed. train/entropy is 0.5 and has been at most 1 for 20 steps: one prototype takes "
        "all images. Raise the temperature. Then start a new run. If the run should go on for longer, set the patience "
        "of ssmpretrain.training.CollapseGuard in trainer.callbacks."
    )
    assert stopped.value.exit_code == 1
    warnings = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert [one for one in warnings if "Unless that changes, the run stops at step 30" in one] == [
        "step 20: train/entropy is 0.5 and has been at most 1 for 10 steps: one prototype takes all images. Unless "
        "that changes, the run stops at step 30."
    ]


@pytest.mark.parametrize("gauge", [[0.5] * 19 + [1.5] + [0.5] * 20, [float("nan")] * 40, [1.01] * 40])
def test_a_gauge_that_leaves_its_limit_in_time_does_not_stop_the_run(gauge: list[float]) -> None:
    assert fit(gauge, CollapseGuard(patience=20)) == STEPS


@pytest.mark.parametrize(("interval", "accumulate"), [(4, 1), (4, 3), (0, 1)])
def test_only_steps_that_are_logged_are_looked_at(interval: int, accumulate: int) -> None:
    """Steps 4, 8, 12 ... have 0.5, so the other ones do not count; without logged steps every 50th is looked at."""
    gauge = [0.5 if (step + 1) % 4 == 0 else 5.0 for step in range(STEPS)]
    if interval:
        with pytest.raises(TrainingDiverged, match=r"^step 24: .* for 20 steps"):
            fit(gauge, CollapseGuard(patience=20), interval, accumulate)
    else:
        assert fit(gauge, CollapseGuard(patience=1), interval) == STEPS


@pytest.mark.parametrize(("steps", "patience"), [(300, 200), (3000, 300)])
def test_patience_is_a_tenth_of_the_run_and_at_least_200_steps(steps: int, patience: int) -> None:
    guard = CollapseGuard()
    guard.on_train_start(SimpleNamespace(estimated_stepping_batches=steps), Gauged([]))  # type: ignore[arg-type]
    assert guard._patience == patience


def test_infinite_patience_only_looks(caplog: pytest.LogCaptureFixture) -> None:
    assert fit([0.5] * STEPS, CollapseGuard(patience=float("inf"))) == STEPS and "Unless" not in caplog.text


def test_a_continued_run_stops_where_the_uninterrupted_one_does(tmp_path: Path) -> None:
    file = tmp_path / "epoch.ckpt"
    fit([5.0] * 9 + [0.5] * 6, CollapseGuard(patience=20), file=file)
    with pytest.raises(TrainingDiverged, match=r"^step 30: .* for 20 steps"):
        fit([0.5] * STEPS, CollapseGuard(patience=20), epochs=2, ckpt_path=file)


def test_a_guard_of_an_objective_without_limits_says_that_it_has_no_effect(caplog: pytest.LogCaptureFixture) -> None:
    CollapseGuard().on_train_start(SimpleNamespace(estimated_stepping_batches=9), LightningModule())  # type: ignore[arg-type]
    assert "CollapseGuard has no effect, because LightningModule has no collapse_limits()." in caplog.text


@pytest.mark.parametrize("patience", [0, -5, 0.5, float("nan")])
def test_a_patience_below_one_step_is_refused(patience: float) -> None:
    with pytest.raises(UserError, match="patience is at least 1 step; got"):
        CollapseGuard(patience=patience)


def test_a_limit_has_a_side() -> None:
    with pytest.raises(UserError, match="side is above or below; got 'over'"):
        CollapseLimit("train/kl", 0.0, "over", "nothing", "Do nothing.")  # type: ignore[arg-type]


@pytest.mark.parametrize("chosen", [[], [CollapseGuard(patience=7)]])
def test_an_objective_of_views_adds_the_guard_unless_the_recipe_names_one(
    chosen: list[Callback], tmp_path: Path
) -> None:
    objective = LeJEPA("test_vim", {"img_size": 32, "embed_dim": 32, "depth": 1}, projector_hidden=[8])
    objective.trainer = Trainer(accelerator="cpu", callbacks=chosen, logger=False, default_root_dir=tmp_path)
    added = [one for one in objective.configure_callbacks() if isinstance(one, CollapseGuard)]
    assert [one.patience for one in added] == ([] if chosen else [None])
