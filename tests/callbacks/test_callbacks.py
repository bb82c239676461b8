"""Measurements, figures and printed lines of the callbacks during a short real run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image

from ssmpretrain.base.run_folder import RunFolder
from ssmpretrain.callbacks import LossPlot, OnlineEvaluation, PlainProgress, Reconstructions, Throughput
from ssmpretrain.callbacks.loss_plot import draw_loss
from ssmpretrain.callbacks.reconstructions import draw_columns
from ssmpretrain.datamodules import ImageShards
from ssmpretrain.evaluation.features import evaluate
from ssmpretrain.objectives import MAE
from ssmpretrain.run.metrics_logger import MetricsLogger


def tiny_mae() -> MAE:
    torch.manual_seed(0)
    return MAE("test_vim", {"img_size": 32}, decoder_embed_dim=32)


def test_a_run_logs_evaluation_throughput_and_pictures(
    tmp_path: Path, write_shard: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    shard = str(write_shard(tmp_path / "s.tar", count=16))
    data = ImageShards(train=shard, val=shard, batch_size=4, image_size=32, num_workers=0)
    folder = RunFolder(tmp_path / "run")
    folder.prepare()
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, default_root_dir=folder.path, logger=MetricsLogger(folder),
        log_every_n_steps=1, num_sanity_val_steps=0, enable_model_summary=False, enable_checkpointing=False,
        callbacks=[OnlineEvaluation(k=3), Reconstructions(2), LossPlot(), Throughput(2), PlainProgress(0.0)],
    )  # fmt: skip
    model = tiny_mae()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    trainer.fit(model, data)
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    seen = {name: [row[name] for row in rows if name in row] for name in set().union(*rows)}
    assert len(seen["val/knn"]) == 2 and 0 <= seen["val/linear_probe"][0] <= 1
    assert 1 <= seen["val/effective_rank"][0] <= 16
    assert all(rate > 0 for rate in seen["train/images_per_second"])
    assert all(0 <= share <= 1 for share in seen["train/data_wait"])
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for name in ("reconstruction.png", "loss.png"):
        assert Image.open(folder.plots / name).size[0] > 300
    out = capsys.readouterr().out
    assert "epoch 1/2  step 4/8" in out and "epoch 2/2  validation" in out and "\r" not in out


def test_evaluation_leaves_no_gradient_and_does_not_train() -> None:
    features, labels = torch.randn(20, 4, requires_grad=False), torch.arange(20) % 2
    results = evaluate(features, labels, features, labels, k=1)
    assert results["knn"] == 1.0


def test_unlabelled_data_gets_the_effective_rank_alone() -> None:
    unlabelled = torch.full((10,), -1)
    results = evaluate(torch.randn(10, 4), unlabelled, torch.randn(10, 4), unlabelled)
    assert set(results) == {"effective_rank"}


def test_figure_has_titles_one_row_per_image_and_no_margins() -> None:
    left, right = torch.zeros(2, 3, 16, 32), torch.ones(2, 3, 16, 32)
    right[1, 0] = 0.5
    figure = draw_columns({"left": left, "right": right})
    assert [text.get_text() for text in figure.texts] == ["left", "right"] and figure.dpi == 300
    pictures = [np.asarray(axis.images[0].get_array()) for axis in figure.axes]
    assert [picture[3, 5].tolist() for picture in pictures] == [[0, 0, 0], [0, 0, 0], [1, 1, 1], [0.5, 1, 1]]
    boxes = [axis.get_position() for axis in figure.axes]
    assert boxes[0].x0 == pytest.approx(0) and boxes[-1].x1 == pytest.approx(1)
    assert boxes[1].y0 == pytest.approx(0) and boxes[0].y0 > boxes[1].y1
    width, height = figure.get_size_inches()
    assert boxes[0].width * width == pytest.approx(2 * boxes[0].height * height)


def test_metrics_without_losses_draw_nothing(tmp_path: Path) -> None:
    draw_loss([{"step": 1, "lr": 0.1}], tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


@pytest.mark.parametrize(
    "make",
    [
        lambda: OnlineEvaluation(k=0),
        lambda: OnlineEvaluation(every_n_epochs=0),
        lambda: Reconstructions(0),
        lambda: Throughput(0),
    ],
)
def test_counts_below_one_are_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="at least 1; got 0"):
        make()


def test_online_evaluation_names_what_a_data_module_lacks() -> None:
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(ValueError, match="OnlineEvaluation: a data module has bank_dataloader"):
        OnlineEvaluation().setup(trainer, MAE("test_vim", {"img_size": 32}), "fit")
