"""LeJEPA: the loss by hand, what it reads and logs, a step, its limits of collapse, refused settings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dino_run import fit
from lejepa_job import Views
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.objectives import LeJEPA
from ssmpretrain.objectives.joint_embedding.lejepa import invariance
from ssmpretrain.objectives.joint_embedding.sigreg import random_slices, sigreg
from ssmpretrain.training import AdamW, CollapseGuard, Cosine, TrainingDiverged

VIM: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1}
ALL_STEPS = {"log_every_n_steps": 1}


def tiny(**changes: Any) -> LeJEPA:
    torch.manual_seed(0)
    small = {"projector_hidden": [16], "projector_dim": 8, "num_slices": 16}
    training = {"optimizer": AdamW(lr_per_256=0.32), "schedule": Cosine(warmup_epochs=0)}
    return LeJEPA("test_vim", **{"encoder_args": VIM, **small, **training, **changes})


def test_invariance_is_the_mean_squared_distance_to_the_mean_of_the_global_views() -> None:
    z = torch.tensor([[[1.0, 0.0]], [[3.0, 2.0]], [[0.0, 5.0]]], dtype=torch.float64).requires_grad_()  # V 3, B 1, K 2
    value = invariance(z, num_global=2)  # the mean of the global views is (2, 1)
    assert float(value.detach()) == pytest.approx((1 + 1 + 1 + 1 + 4 + 16) / 6)
    (gradient,) = torch.autograd.grad(value, z)
    # 2/6 of a view's own distance, and for a global view minus 2/6 of half the sum of all distances, (-2, 4).
    expected = torch.tensor([[[-1.0, -1.0]], [[1.0, 1.0]], [[-2.0, 4.0]]], dtype=torch.float64)
    expected[:2] -= torch.tensor([-2.0, 4.0]) / 2
    torch.testing.assert_close(gradient, expected / 3)


class Kept(Callback):
    """Keeps the numbers that each training step logged."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def test_the_loss_is_the_weighted_sum_over_projections_of_all_views_normalised_by_size() -> None:
    model, kept = tiny(sigreg_weight=0.3, optimizer=AdamW(lr_per_256=0)), Kept()
    data = Views(8)
    fit(model, data, kept, max_steps=1, **ALL_STEPS)
    views = next(iter(data.train_dataloader()))["views"]
    with torch.no_grad():
        # One view after the other through the encoder, and all views of a size through the projector.
        sizes = [torch.stack([model(one) for one in views_of.unbind(1)]) for views_of in views]
        z = torch.cat([model.projector(one.flatten(0, 1)).view(*one.shape[:2], -1) for one in sizes])  # (4, 8, 8)
        gaussian = torch.stack([sigreg(one[None], random_slices(8, 16, 0, z.device)) for one in z]).mean()
        apart = (z - (z[0] + z[1]) / 2).square().mean()
    logged = kept.logged[0]
    assert logged["train/sigreg"] == pytest.approx(float(gaussian), rel=1e-5)
    assert logged["train/invariance"] == pytest.approx(float(apart), rel=1e-5)
    assert logged["train/loss"] == pytest.approx(float(0.3 * gaussian + 0.7 * apart), rel=1e-5)
    assert 1 <= logged["train/effective_rank"] <= 8


def test_slices_are_new_in_each_step() -> None:
    kept = Kept()
    fit(tiny(optimizer=AdamW(lr_per_256=0)), OneBatch(8), kept, **ALL_STEPS)
    assert len({one["train/sigreg"] for one in kept.logged}) == 3
    assert len({one["train/invariance"] for one in kept.logged}) == 1


def test_a_continued_run_has_the_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    file, settings = tmp_path / "epoch.ckpt", {"encoder_args": {**VIM, "drop_path_rate": 0.5}}
    whole, again = tiny(**settings), tiny(**settings)

    class Save(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(file)

    fit(whole, Views(8), Save(), max_epochs=2)
    fit(again, Views(8), resume=file, max_epochs=2)
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())


def test_a_step_under_bfloat16_has_nearly_the_loss_of_float32() -> None:
    logged = []
    for precision in ("32-true", "bf16-mixed"):
        kept = Kept()
        fit(tiny(), Views(8), kept, max_steps=1, precision=precision, **ALL_STEPS)
        logged.append(kept.logged[0])
    for name in ("train/sigreg", "train/invariance", "train/loss"):
        assert logged[1][name] == pytest.approx(logged[0][name], rel=0.02), name


class OneBatch(Views):
    """The same batch in every step."""

    def train_dataloader(self) -> Any:
        loader = super().train_dataloader()
        first: Tensor = loader.dataset[0]
        return torch.utils.data.DataLoader([first] * 3, batch_size=None)  # type: ignore[arg-type]


def test_training_lowers_the_loss_and_without_sigreg_collapses_and_is_stopped() -> None:
    settings, kept = {"max_epochs": 6, "log_every_n_steps": 2}, Kept()
    fit(tiny(), Views(8), CollapseGuard(patience=8), kept, **settings)
    losses = [one["train/loss"] for one in kept.logged]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    with pytest.raises(TrainingDiverged, match=r"(?s)nearly one point.*Raise model.sigreg_weight"):
        fit(tiny(sigreg_weight=0.0), Views(8), CollapseGuard(patience=8), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigreg_weight": 1.5}, r"sigreg_weight lies in \[0, 1\]; got 1.5"),
        ({"projector_hidden": []}, r"got projector_hidden \[\] and projector_dim 8"),
        ({"projector_dim": 0}, "projector_dim 0"),
        ({"num_slices": 0}, "num_slices is at least 1; got 0"),
        ({"num_knots": 1}, r"num_knots is at least 2, .* got 1 and 3.0"),
        ({"knot_range": 0.0}, "got 17 and 0.0"),
        ({"encoder": None}, "got neither"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings: dict[str, Any], message: str) -> None:
    make: Callable[..., LeJEPA] = LeJEPA if "encoder" in settings else tiny
    with pytest.raises(UserError, match=message):
        make(**settings)
