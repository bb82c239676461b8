"""Segmentation and detection of real photographs: cut-outs of Debian's tuxpaint-stamps-default on photographs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stamps import KINDS, STAMPS, compose, files_of, write_shards

from ssmpretrain.cli import main
from ssmpretrain.datamodules import DetectionShards, LargeScaleJitter, SegmentationShards
from ssmpretrain.evaluation.dense import ConfusionMatrix, DetectionRecords

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
def test_segmentation_trains_and_reports_its_scores(shards: dict[str, str], tmp_path: Path) -> None:
    head = "head: {class_path: ssmpretrain.objectives.dense.heads.UPerNet, init_args: {channels: 16}}"
    assert 0 < fitted("Segmentation", CLASSES, shards, tmp_path, head)["mIoU"] < 1


@pytest.mark.slow
def test_detection_trains_and_reports_average_precision(shards: dict[str, str], tmp_path: Path) -> None:
    jitter = "ssmpretrain.datamodules.LargeScaleJitter"
    report = fitted("Detection", list(KINDS), shards, tmp_path, "detector: {name: fcos}", jitter)
    assert 0 <= report["box"]["ap"] < 1


def fitted(
    task: str, classes: list[str], shards: dict[str, str], folder: Path, parts: str, augmentation: str = ""
) -> dict[str, Any]:
    """Train for two steps, and return the scores that the run reports."""
    recipe, run = folder / "recipe.yaml", folder / "run"
    data: dict[str, Any] = {**shards, "classes": classes, "image_size": SIZE, "batch_size": 8, "num_workers": 0}
    data |= {"augmentation": {"class_path": augmentation}} if augmentation else {}
    recipe.write_text(
        f"""
model:
  class_path: ssmpretrain.objectives.{task}
  init_args:
    encoder: test_vmamba
    num_classes: {len(classes)}
    {parts}
    schedule: {{class_path: ssmpretrain.training.optim.schedules.Cosine, init_args: {{warmup_epochs: 0}}}}
data:
  class_path: ssmpretrain.datamodules.{task}Shards
  init_args: {json.dumps(data)}
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 1
  num_sanity_val_steps: 0
  callbacks: [{{class_path: ssmpretrain.callbacks.DensePredictions}}]
"""
    )
    assert main(["fit", "--config", str(recipe), "--run_dir", str(run)]) == 0
    assert (run / "plots" / "predictions.png").stat().st_size > 10_000
    report: dict[str, Any] = json.loads((run / f"{task.lower()}.json").read_text())
    return report


def test_perfect_predictions_of_photographs_score_one(scenes: dict[str, list[dict[str, Any]]]) -> None:
    matrix = ConfusionMatrix(len(CLASSES))
    for scene in scenes["val"]:
        label = torch.from_numpy(np.asarray(scene["classes"]))
        matrix.update(label.long(), label)
    assert matrix.scores().miou == 1


def test_the_objects_of_photographs_found_exactly_have_average_precision_one(shards: dict[str, str]) -> None:
    jitter = LargeScaleJitter(scale=(1.0, 1.0))
    data = DetectionShards(
        **shards, classes=list(KINDS), image_size=SIZE, batch_size=4, num_workers=0, augmentation=jitter
    )
    data.setup("fit")
    records = DetectionRecords()
    for batch in data.val_dataloader():
        for key, annotation, objects in zip(batch["key"], batch["annotation"], batch["objects"], strict=True):
            masks = [one["segmentation"] for one in annotation["objects"]]
            records.add(key, annotation, objects["boxes"], torch.ones(len(masks)), objects["classes"], masks)
    scores = records.evaluate(list(KINDS)).named()
    assert scores["box_AP"] == scores["mask_AP"] == pytest.approx(1)
