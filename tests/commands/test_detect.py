"""`detect` from its command line."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_runs import NAMES, fit_one_step, tiny_detection, tiny_segmentation
from PIL import Image
from pycocotools.coco import COCO
from torchvision.io import read_image
from torchvision.models.detection.roi_heads import paste_masks_in_image

from ssmpretrain.evaluation.dense import decode_mask
from ssmpretrain.objectives import Detection
from ssmpretrain.objectives.restore import restore

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def detection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit_one_step(tmp_path_factory.mktemp("detection"), tiny_detection())


@pytest.fixture
def run(call: Run, image_folder: Path) -> Run:
    """Exit code, standard output and our own lines of standard error of `detect`."""
    return partial(call, "detect")


def results(folder: str) -> dict[str, Any]:
    return dict(json.loads(Path(folder, "detections.json").read_text()))


def by_hand(folder: Path, path: str) -> dict[str, torch.Tensor]:
    """The detections in an image of 48 x 96 pixels, which is the size in the validation of the run."""
    content = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    restored = restore(content, folder, Detection)
    assert restored is not None
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
    image = (read_image(path) / 255 - mean) / std
    return dict(restored.model.detect(image[None], [[48, 96]])[0])


def test_detections_are_written_as_coco_reads_them(run: Run, detection: Path) -> None:
    noise = torch.randint(256, (48, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    Image.fromarray(noise.numpy()).save("images/a.png")
    code, out, message = run(detection, "images/a.png")
    assert (code, message) == (0, "")
    assert "Detection of test_vmamba, 3 classes; objects of score 0.5 and more are drawn" in out
    found, expected = results("detected"), by_hand(detection, "images/a.png")
    assert found["images"] == [{"id": 1, "file_name": "images/a.png", "height": 48, "width": 96}]
    assert found["categories"] == [{"id": number, "name": name} for number, name in enumerate(NAMES, 1)]
    rows = found["annotations"]
    assert len(rows) == len(expected["boxes"]) > 0
    boxes = torch.tensor([row["bbox"] for row in rows])
    boxes[:, 2:] += boxes[:, :2]
    torch.testing.assert_close(boxes, expected["boxes"], atol=1e-3, rtol=0)
    torch.testing.assert_close(torch.tensor([row["score"] for row in rows]), expected["scores"])
    assert [row["category_id"] - 1 for row in rows] == expected["classes"].tolist()
    pasted = paste_masks_in_image(expected["masks"][:1, None], boxes[:1], (48, 96))[0, 0] > 0.5
    assert (decode_mask(rows[0]["segmentation"]) == pasted.numpy()).mean() > 0.99
    table = COCO("detected/detections.json")
    assert len(table.loadRes(rows).getAnnIds()) == len(rows)


def test_boxes_are_in_pixels_of_the_file(run: Run, detection: Path) -> None:
    with Image.open("images/0.png") as image:
        image.resize((96, 48)).save("images/a.png")
    with Image.open("images/a.png") as image:
        image.resize((288, 144), Image.Resampling.NEAREST).save("images/b.png")
    assert run(detection, "images/a.png", "images/b.png")[0] == 0
    small, large = ([row for row in results("detected")["annotations"] if row["image_id"] == n] for n in (1, 2))
    assert len(small) == len(large) > 0
    for one, three in zip(small, large, strict=True):
        assert three["bbox"] == pytest.approx([3 * side for side in one["bbox"]], abs=1)
        assert three["segmentation"]["size"] == [144, 288]
    assert [row["id"] for row in results("detected")["annotations"]] == list(range(1, len(small) + len(large) + 1))


def test_score_decides_what_is_drawn_and_not_what_is_written(run: Run, detection: Path) -> None:
    for score in ("0", "1"):
        assert run(detection, "images/0.png", "--out", score, "--score", score)[0] == 0
    assert results("0") == results("1") and results("0")["annotations"]
    assert Path("0/pictures/0.png").read_bytes() != Path("1/pictures/0.png").read_bytes()
    _, out, _ = run(detection, "images/0.png", "--score", "1")
    assert "  0: no object" in out


def test_a_detector_of_boxes_writes_no_masks(run: Run, tmp_path_factory: pytest.TempPathFactory) -> None:
    model = tiny_detection(detector={"name": "faster_rcnn"})
    assert run(fit_one_step(tmp_path_factory.mktemp("boxes"), model), "images/0.png", "--score", "0")[0] == 0
    rows = results("detected")["annotations"]
    assert rows and all("segmentation" not in row for row in rows)
    assert rows[0]["area"] == pytest.approx(rows[0]["bbox"][2] * rows[0]["bbox"][3])


def test_bad_images_are_left_out_of_the_results(run: Run, detection: Path, caplog: pytest.LogCaptureFixture) -> None:
    Path("images/1.png").write_text("no image")
    code, out, _ = run(detection, "images/0.png", "images/1.png", "images/2.png")
    assert code == 0 and "left out 1 of 3: undecodable images (1)" in out and "images/1.png" in caplog.text
    assert [image["file_name"] for image in results("detected")["images"]] == ["images/0.png", "images/2.png"]
    assert {row["image_id"] for row in results("detected")["annotations"]} == {1, 2}


def test_results_are_replaced_only_when_told(run: Run, detection: Path) -> None:
    Path("detected").mkdir()
    Path("detected/detections.json").write_text("precious")
    code, _, message = run(detection, "images/0.png")
    assert code == 2 and "detected/detections.json" in message and "--force" in message
    assert Path("detected/detections.json").read_text() == "precious"
    assert run(detection, "images/0.png", "--force")[0] == 0 and results("detected")["images"]


def test_a_mistake_gets_one_short_message_and_exit_code_2(
    run: Run, detection: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    code, _, message = run(detection, "images/0.png", "--score", "50")
    assert code == 2 and "--score is from 0 to 1; got 50" in message
    other = fit_one_step(tmp_path_factory.mktemp("segmentation"), tiny_segmentation())
    code, _, message = run(other, "images/0.png")
    assert code == 2 and "of a run of Segmentation" in message and "ssmpretrain segment" in message
