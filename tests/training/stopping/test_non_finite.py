"""A bad step is skipped, a diverged run stops, a bad weight is never saved."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from ssmpretrain.training.stopping.non_finite import NonFiniteGuard, TrainingDiverged


class Toy(LightningModule):
    """Fits a scalar; the gradient is not finite at the steps in `bad`."""

    def __init__(self, bad: set[int]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.bad = bad
        self.history: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.history.append(self.weight.detach().clone())
        loss = (self.weight * batch.mean()).square().sum()
        return loss * float("nan") if batch_idx in self.bad else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.5)


def fit(model: Toy, guard: NonFiniteGuard, folder: Path) -> Trainer:
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[guard], logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(model, DataLoader(torch.ones(20), batch_size=1))
    return trainer


def test_a_bad_step_changes_nothing_and_is_counted(tmp_path: Path) -> None:
    model, guard = Toy({4, 7}), NonFiniteGuard()
    trainer = fit(model, guard, tmp_path)
    assert guard.skipped == 2 and trainer.callback_metrics["train/skipped_steps"] == 2
    assert torch.equal(model.history[4], model.history[5]) and torch.equal(model.history[7], model.history[8])
    assert not torch.equal(model.history[5], model.history[6])
    assert model.weight.isfinite().all()


def test_a_few_bad_steps_in_a_row_stop_the_run(tmp_path: Path) -> None:
    model = Toy(set(range(5, 20)))
    with pytest.raises(TrainingDiverged, match="3 times in a row"):
        fit(model, NonFiniteGuard(max_in_a_row=3), tmp_path)
    assert len(model.history) == 8 and model.weight.isfinite().all()


class Steep(Toy):
    """Has gradients of 1e20, whose squares float32 does not hold, at step 2."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return super().training_step(batch, -1) * (1e20 if batch_idx == 2 else 1)


def test_a_skipped_step_names_the_first_parameter_also_if_only_the_norm_overflows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, guard = Steep(set()), NonFiniteGuard()
    fit(model, guard, tmp_path)
    message = "step 2 skipped: loss or gradient is not finite (1 of 1 gradients, first weight with norm inf)"
    assert message in caplog.text and guard.skipped == 1
    assert torch.equal(model.history[2], model.history[3]) and not torch.equal(model.history[3], model.history[4])


def test_good_steps_in_between_reset_the_count(tmp_path: Path) -> None:
    guard = NonFiniteGuard(max_in_a_row=2)
    fit(Toy({1, 3, 5, 7, 9}), guard, tmp_path)
    assert guard.skipped == 5


def test_a_checkpoint_with_a_bad_weight_is_not_written(tmp_path: Path) -> None:
    model = Toy(set())
    trainer = fit(model, NonFiniteGuard(), tmp_path)
    with torch.no_grad():
        model.weight[1] = float("inf")
    with pytest.raises(TrainingDiverged, match=r"not written.*weight"):
        trainer.save_checkpoint(tmp_path / "bad.ckpt")
    assert not (tmp_path / "bad.ckpt").exists()


def test_the_count_survives_a_checkpoint() -> None:
    guard, resumed = NonFiniteGuard(), NonFiniteGuard()
    guard.skipped = 3
    resumed.load_state_dict(guard.state_dict())
    assert resumed.skipped == 3


class Forgets(Toy):
    """Computes no loss at the steps in `bad`."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:  # type: ignore[override]
        return None if batch_idx in self.bad else super().training_step(batch, -1)


@pytest.mark.parametrize(("steps", "manual", "told"), [(20, False, 1), (19, False, 0), (20, True, 0)])
def test_an_epoch_without_a_loss_is_told(
    steps: int, manual: bool, told: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Forgets(set(range(steps)))
    model.automatic_optimization = not manual
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, callbacks=[NonFiniteGuard()], logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(torch.ones(20), batch_size=1))
    message = "train: training_step of Forgets returned None in every step of the epoch; nothing was trained."
    assert caplog.text.count(message) == told
