"""The baseline trains as a run of its own would, and changes nothing of the run beside it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

import ssmpretrain
from ssmpretrain.base.errors import UserError
from ssmpretrain.callbacks import UntrainedBaseline
from ssmpretrain.callbacks.untrained_baseline import comparison
from ssmpretrain.datamodules import SegmentationScenes
from ssmpretrain.objectives import Segmentation
from ssmpretrain.objectives.dense.heads import UPerNet
from ssmpretrain.training.optim.adamw import AdamW
from ssmpretrain.training.optim.schedules import Cosine

ARGS = {"embed_dim": 16, "depths": [1, 1]}


class Losses(Callback):
    """Keep the logged losses of each step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items() if "loss" in name})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], SegmentationScenes]:
    folder = tmp_path_factory.mktemp("scenes")

    def make() -> SegmentationScenes:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SSMPRETRAIN_CACHE", str(folder))
            return SegmentationScenes(train_images=8, val_images=4, image_size=32, batch_size=4, num_workers=0)

    return make


@pytest.fixture
def fit(tmp_path: Path, data: Callable[[], SegmentationScenes]) -> Callable[..., Trainer]:
    """Train for epochs of two steps; returns the trainer."""

    def run(*callbacks: Callback, source: int | None = 1, ckpt_path: Path | None = None, **settings: Any) -> Trainer:
        path = tmp_path / f"{source}.safetensors"
        if source is not None and not path.exists():
            torch.manual_seed(source)
            ssmpretrain.save_encoder(ssmpretrain.create_encoder("test_vmamba", num_classes=0, **ARGS), path)
        torch.manual_seed(5)
        model = Segmentation(
            "test_vmamba", ARGS, None if source is None else str(path), num_classes=7, head=UPerNet(channels=8),
            optimizer=AdamW(lr_per_256=0.3), schedule=Cosine(warmup_epochs=0.5),
        )  # fmt: skip
        trainer = Trainer(
            accelerator="cpu", callbacks=list(callbacks), logger=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path, num_sanity_val_steps=0,
            **{"max_epochs": 2, "enable_checkpointing": False, "gradient_clip_val": 0.5, **settings},
        )  # fmt: skip
        trainer.fit(model, datamodule=data(), ckpt_path=ckpt_path, weights_only=True)
        return trainer

    return run


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return trainer.lightning_module.state_dict()


def test_the_run_is_the_one_without_the_callback(fit: Callable[..., Trainer]) -> None:
    with_it, without = weights(fit(UntrainedBaseline())), weights(fit())
    assert all(torch.equal(with_it[name], value) for name, value in without.items())


def test_from_the_same_weights_the_baseline_takes_the_same_steps(
    fit: Callable[..., Trainer], capsys: pytest.CaptureFixture[str]
) -> None:
    losses = Losses()
    trainer = fit(UntrainedBaseline(seed=1), losses, source=1)  # `source` is drawn by the same seed
    assert len(losses.rows) == 4
    assert all(row["train/loss"] == pytest.approx(row["train/loss_untrained"], rel=1e-5) for row in losses.rows)
    scores = trainer.callback_metrics
    assert float(scores["val/mIoU"]) == pytest.approx(float(scores["val/mIoU_untrained"]), abs=0.01)
    assert "encoder from" in capsys.readouterr().out


def test_from_other_weights_only_the_encoder_differs(fit: Callable[..., Trainer]) -> None:
    losses = Losses()
    fit(UntrainedBaseline(seed=2), losses, source=1)
    assert all(row["train/loss"] != row["train/loss_untrained"] for row in losses.rows)


def test_a_continued_run_continues_its_baseline(fit: Callable[..., Trainer], tmp_path: Path) -> None:
    whole, halves = Losses(), Losses()
    fit(UntrainedBaseline(), whole)
    stopper = _StopAfter(1, tmp_path / "half.ckpt")
    fit(UntrainedBaseline(), halves, stopper)
    fit(UntrainedBaseline(), halves, ckpt_path=tmp_path / "half.ckpt")
    assert halves.rows == whole.rows


class _StopAfter(Callback):
    """Save a checkpoint after some epochs and stop."""

    def __init__(self, epochs: int, path: Path) -> None:
        self.epochs, self.path = epochs, path

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.current_epoch + 1 == self.epochs:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


@pytest.mark.parametrize(
    ("source", "settings", "said"),
    [
        (None, {}, "begins with the weights of model.init_from.*Set it to a pretrained run"),
        (1, {"accumulate_grad_batches": 2}, "one batch a step; got accumulate_grad_batches 2. Set it to 1"),
    ],
)
def test_a_run_without_a_comparison_is_refused(
    source: int | None, settings: dict[str, Any], said: str, fit: Callable[..., Trainer]
) -> None:
    with pytest.raises(UserError, match=said):
        fit(UntrainedBaseline(), source=source, **settings)


def test_the_table_pairs_metrics_of_validation() -> None:
    metrics = {"val/mIoU": 0.5, "val/mIoU_untrained": 0.25, "train/loss": 1.0, "train/loss_untrained": 2.0, "val/x": 1}
    rows = comparison(metrics, "runs/a").splitlines()
    assert [row.split() for row in rows[2:]] == [["mIoU", "25.0", "50.0", "+25.0"]]
    assert rows[1].endswith("encoder from runs/a")
