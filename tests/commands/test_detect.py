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
from pycocotools.cocoeval import COCOeval
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


def annotations(images: dict[str, int | str], categories: dict[str, int], objects: list[dict[str, Any]]) -> str:
    """A COCO file of images of `image_folder` and of one in a folder below it."""
    sizes = {name: Image.open(Path("images", name)).size for name in images}
    content = {
        "images": [
            {"id": number, "file_name": name, "width": sizes[name][0], "height": sizes[name][1]}
            for name, number in images.items()
        ],
        "categories": [{"id": number, "name": name} for name, number in categories.items()],
        "annotations": [{**one, "id": number, "iscrowd": 0} for number, one in enumerate(objects, 1)],
    }
    Path("own.json").write_text(json.dumps(content))
    return "own.json"


def scored(truth: str, rows: list[dict[str, Any]], kind: str) -> list[float]:
    table = COCO(truth)
    evaluator = COCOeval(table, table.loadRes(rows), kind)
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    return list(map(float, evaluator.stats))


def test_detections_with_the_ids_of_a_file_score_as_with_their_own(run: Run, detection: Path) -> None:
    Path("images/day").mkdir()
    Path("images/0.png").rename("images/day/1.png")  # 1.png and day/1.png are two images
    for number in range(3, 10):
        Path(f"images/{number}.png").unlink()
    assert run(detection, "images")[0] == 0
    own = results("detected")
    names = [image["file_name"].removeprefix("images/") for image in own["images"]]
    assert sorted(names) == ["1.png", "2.png", "day/1.png"]
    truth = [  # some detections are right, in each class
        {name: row[name] for name in ("image_id", "category_id", "bbox", "area", "segmentation")}
        for row in own["annotations"][::2]
    ]
    Path("plain.json").write_text(json.dumps({**own, "annotations": [
        {**row, "id": number, "iscrowd": 0} for number, row in enumerate(truth, 1)
    ]}))  # fmt: skip
    images, categories = {"2.png": 70, "day/1.png": 900, "1.png": 5}, dict(zip(NAMES, (30, 7, 18), strict=True))
    moved = [{**row, "image_id": images[names[row["image_id"] - 1]]} for row in truth]
    moved = [{**row, "category_id": categories[NAMES[row["category_id"] - 1]]} for row in moved]
    file = annotations(images, categories, moved)
    code, out, message = run(detection, "images", "--annotations", file, "--out", "theirs")
    assert (code, message) == (0, "") and "own.json" not in out
    found = results("theirs")
    assert {image["file_name"]: image["id"] for image in found["images"]} == images
    assert {one["name"]: one["id"] for one in found["categories"]} == categories
    for kind in ("bbox", "segm"):
        expected = scored("plain.json", own["annotations"], kind)
        assert scored(file, found["annotations"], kind) == expected and 0.1 < expected[0] < 1


def test_a_file_of_other_images_or_categories_is_refused(run: Run, detection: Path) -> None:
    classes = dict(zip(NAMES, (1, 2, 3), strict=True))

    def told(*words: str, code: int = 2, file: str = "") -> str:
        found = run(detection, *words, "--annotations", file or "own.json", "--force")
        assert found[0] == code
        return found[1] + found[2]

    annotations({"0.png": 1, "3.png": "b"}, classes, [])
    assert "own.json does not list images/1.png, images/2.png. Give" in told(*(f"images/{n}.png" for n in range(3)))
    Path("images/copy").mkdir()
    Path("images/copy/3.png").write_bytes(Path("images/0.png").read_bytes())
    for number in (*range(3), *range(4, 10)):
        Path(f"images/{number}.png").rename(f"{number}.png")
    assert "got images/3.png and images/copy/3.png for 3.png of own.json" in told("images")
    Path("0.png").rename("images/0.png")
    assert "own.json: 1 of 2 images have no detections; score" in told("images/0.png", code=0)
    Image.new("RGB", (30, 20)).save("images/copy/3.png")
    assert "3.png has 30 x 20 pixels, in own.json 50 x 43" in told("images/copy/3.png")
    annotations({"0.png": 1}, {"sky": 1, "groesse": 2, "tree": 3}, [])
    assert "has none for größe; it has sky, groesse, tree" in told("images/0.png")
    annotations({"0.png": 1}, {**classes, "dog": 9}, [])
    assert "own.json: categories that the run does not know: dog" in told("images/0.png", code=0)
    Path("list.json").write_text("[]")
    assert "lists images and categories; got no images" in told("images/0.png", file="list.json")
    assert "no annotation file nowhere.json" in told("images/0.png", file="nowhere.json")


def test_a_mistake_gets_one_short_message_and_exit_code_2(
    run: Run, detection: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    code, _, message = run(detection, "images/0.png", "--score", "50")
    assert code == 2 and "--score is from 0 to 1; got 50" in message
    other = fit_one_step(tmp_path_factory.mktemp("segmentation"), tiny_segmentation())
    code, _, message = run(other, "images/0.png")
    assert code == 2 and "of a run of Segmentation" in message and "ssmpretrain segment" in message
