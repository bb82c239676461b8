"""Evaluation of a COCO file with odd objects: the scores are those of pycocotools on the file itself."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_folder import NAMES, coco, write_coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ssmpretrain.cli import main
from ssmpretrain.datamodules import CocoDetection, DetectionShards, LargeScaleJitter
from ssmpretrain.datamodules.dense.detection_data import DetectionData
from ssmpretrain.evaluation.dense import DetectionRecords, DetectionScores
from ssmpretrain.evaluation.dense.masks import encode_mask

SMALL: dict[str, Any] = {"batch_size": 4, "num_workers": 0, "image_size": 32, "augmentation": LargeScaleJitter()}
UNTRAINABLE = {
    "area of 0 or less": 2,
    "box narrower or lower than 1 pixel": 2,
    "box outside of the image": 1,
    "mask without a pixel": 1,
}


def odd() -> dict[str, Any]:
    """The content of a file with crowds, ids from 0, and objects that are thin, outside, without area or without pixel.

    Images are below 50 pixels, so areas of the file make objects medium or large.
    """
    content = coco()
    rows = content["annotations"]
    for row in rows[::2]:
        if not row["iscrowd"]:
            del row["iscrowd"]
    x, y = rows[5]["bbox"][:2]
    for place, change in {
        0: {"area": 0},
        1: {"area": -3.5},
        3: {"area": 2000.0},
        4: {"area": 20000},
        6: {"bbox": [3.5, 2.5, 0.4, 9]},
        7: {"bbox": [3, 2, -4, 5]},
        9: {"bbox": [-3.5, -2, 12.0, 11.25]},
        10: {"bbox": [5, 9, 90, 70]},
        12: {"bbox": [200, 10, 5, 5]},
        13: {"segmentation": [[x, y, x, y, x, y]]},
        15: {"area": rows[15]["area"] * 3, "iscrowd": 1},
    }.items():
        rows[place].update(change)
    return content


def detections(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Boxes and masks near the objects and elsewhere, each with a score of its own, in the form of a result file."""
    rng = np.random.default_rng(7)
    sizes = {one["id"]: (one["height"], one["width"]) for one in content["images"]}
    rows = []
    for one in [each for each in content["annotations"] for _ in range(3)]:
        h, w = sizes[one["image_id"]]
        x, y, width, height = one["bbox"] if rng.random() < 0.9 else (2, 3, 6, 7)
        box = [x, y, abs(width), abs(height)] + rng.choice([0.0, 0.25, 1.0]) * rng.uniform(-1, 1, 4)
        box[2:] = box[2:].clip(0.3)
        mask = np.zeros((h, w), dtype=bool)
        x1, y1, x2, y2 = np.round([*box[:2], *(box[:2] + box[2:])]).astype(int).clip(0)
        mask[y1:y2, x1:x2] = True
        category = one["category_id"] if rng.random() < 0.8 else 90
        row = {"image_id": one["image_id"], "category_id": category, "bbox": box.tolist(), "score": float(rng.random())}
        rows.append({**row, "segmentation": encode_mask(mask)})
    return rows


def theirs(content: dict[str, Any], found: list[dict[str, Any]], folder: Path, kind: str) -> list[float]:
    """The twelve numbers of pycocotools. It cannot read an object without iscrowd, and takes id 0 for no match."""
    content = json.loads(json.dumps(content))
    for row in content["annotations"]:
        row["id"] += 1
        row.setdefault("iscrowd", 0)
    (folder / "theirs.json").write_text(json.dumps(content))
    table = COCO(str(folder / "theirs.json"))
    shape = "bbox" if kind == "bbox" else "segmentation"  # the area of a result is that of its box, if it has one
    rows = [{name: row[name] for name in ("image_id", "category_id", "score", shape)} for row in found]
    evaluation = COCOeval(table, table.loadRes(rows), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return [float(value) for value in evaluation.stats]


def ours(data: DetectionData, content: dict[str, Any], found: list[dict[str, Any]]) -> DetectionScores:
    """The scores of the detections with the annotations of validation batches."""
    data.setup()
    records, numbers = DetectionRecords(), {5: 0, 7: 1, 90: 2}
    ids = {Path(one["file_name"]).stem: one["id"] for one in content["images"]}
    for batch in data.val_dataloader():
        for key, annotation in zip(batch["key"], batch["annotation"], strict=True):
            rows = [row for row in found if row["image_id"] == ids[Path(key).stem]]
            boxes = torch.tensor([row["bbox"] for row in rows], dtype=torch.float64).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            scores = torch.tensor([row["score"] for row in rows], dtype=torch.float64)
            classes = torch.tensor([numbers[row["category_id"]] for row in rows], dtype=torch.int64)
            records.add(key, annotation, boxes, scores, classes, [row["segmentation"] for row in rows])
    return records.evaluate(NAMES)


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_scores_are_those_of_pycocotools_on_the_file(tmp_path: Path, kind: str) -> None:
    content = odd()
    found = detections(content)
    folder, file = write_coco(tmp_path, content)
    out = str(tmp_path / "shards")
    data: DetectionData
    if kind == "folder":
        data = CocoDetection(folder, file, folder, file, **SMALL)
    else:
        assert main(["shards", "pack", folder, out, "--annotations", file]) == 0
        assert main(["shards", "verify", out]) == 0
        data = DetectionShards(out, out, **SMALL)
    scores = ours(data, content, found)
    for own, name in ((scores.box, "bbox"), (scores.mask, "segm")):
        values = list(vars(own).values())[:12]
        expected = [value if value > -1 else float("nan") for value in theirs(content, found, tmp_path, name)]
        assert values == pytest.approx(expected, abs=1e-9, nan_ok=True)
        assert 0.1 < values[0] < 0.9 and values[4] > 0  # detections that would tell a wrong object
    for batch in data.train_dataloader():
        assert all(len(objects["boxes"]) <= 3 for objects in batch["objects"])
    assert data.dropped_objects() == {"train": UNTRAINABLE, "val": {}}


def test_training_on_shards_leaves_out_what_training_on_the_file_leaves_out(tmp_path: Path) -> None:
    folder, file = write_coco(tmp_path, odd())
    assert main(["shards", "pack", folder, str(tmp_path / "shards"), "--annotations", file]) == 0
    loose, packed = CocoDetection(folder, file, **SMALL), DetectionShards(str(tmp_path / "shards"), **SMALL)
    for data in (loose, packed):
        data.setup()
        for _ in range(2):  # an object counts once
            assert len(list(data.train_dataloader())) == 5
        assert data.dropped_objects() == {"train": UNTRAINABLE}
    places = [{(row["cause"], Path(row["key"]).stem) for row in data.dropped_records()} for data in (loose, packed)]
    assert places[0] == places[1] and {row["shard"] for row in packed.dropped_records()} == {""}
