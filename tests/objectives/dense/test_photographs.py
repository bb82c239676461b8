"""Segmentation and detection of real photographs: cut-outs of Debian's tuxpaint-stamps-default on photographs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stamps import KINDS, STAMPS, compose, files_of, write_shards

from ssmpretrain.cli import main
from ssmpretrain.datamodules import SegmentationShards
from ssmpretrain.evaluation.dense import ConfusionMatrix

pytestmark = [
    pytest.mark.photographs,
    pytest.mark.skipif(not STAMPS.is_dir(), reason="apt-get install --no-install-recommends tuxpaint-stamps-default"),
]
SIZE = 96
CLASSES = ["background", *KINDS]


@pytest.fixture(scope="module")
def scenes() -> dict[str, list[dict[str, Any]]]:
    return {"train": list(compose("train", 16, SIZE)), "val": list(compose("val", 8, SIZE))}


@pytest.fixture(scope="module")
def shards(scenes: dict[str, list[dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("photographs")
    return {split: str(write_shards(folder, split, pictures)) for split, pictures in scenes.items()}


def test_training_and_validation_share_no_cut_out() -> None:
    for kind in KINDS:
        train, val = (files_of(kind, split) for split in ("train", "val"))
        assert len(train) > len(val) > 2 and not set(train) & set(val)


def test_class_maps_arrive_as_they_were_composed(
    shards: dict[str, str], scenes: dict[str, list[dict[str, Any]]]
) -> None:
    data = SegmentationShards(**shards, classes=CLASSES, image_size=SIZE, batch_size=4, num_workers=0)
    data.setup("fit")
    found = [mask for batch in data.val_dataloader() for mask in batch["whole_mask"]]
    assert len(found) == 8
    assert all((mask.numpy() == scene["classes"]).all() for mask, scene in zip(found, scenes["val"], strict=True))


@pytest.mark.slow
def test_segmentation_trains_and_reports_the_scores_of_its_own_predictions(
    shards: dict[str, str], scenes: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    data = {"train": shards["train"], "val": shards["val"], "classes": json.dumps(CLASSES), "image_size": SIZE}
    words = [f"--data.{name}={value}" for name, value in data.items()]
    assert main(["fit", "--config", str(recipe(tmp_path)), "--run_dir", str(run), *words]) == 0
    report = json.loads((run / "segmentation.json").read_text())
    assert 0 < report["mIoU"] < 1 and (run / "plots" / "predictions.png").stat().st_size > 10_000


def recipe(folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(
        """
model:
  class_path: ssmpretrain.objectives.Segmentation
  init_args:
    encoder: test_vmamba
    num_classes: 6
    head: {class_path: ssmpretrain.objectives.dense.heads.UPerNet, init_args: {channels: 16}}
    schedule: {class_path: ssmpretrain.training.optim.schedules.Cosine, init_args: {warmup_epochs: 0}}
data:
  class_path: ssmpretrain.datamodules.SegmentationShards
  init_args: {batch_size: 8, num_workers: 0}
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 1
  num_sanity_val_steps: 0
  callbacks: [{class_path: ssmpretrain.callbacks.DensePredictions}]
"""
    )
    return path


def test_perfect_predictions_of_photographs_score_one(scenes: dict[str, list[dict[str, Any]]]) -> None:
    matrix = ConfusionMatrix(len(CLASSES))
    for scene in scenes["val"]:
        label = torch.from_numpy(np.asarray(scene["classes"]))
        matrix.update(label.long(), label)
    assert matrix.scores().miou == 1
