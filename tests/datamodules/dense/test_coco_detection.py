"""COCO folders: objects as the file has them, wrong annotations, missing images, and the classes."""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from coco_folder import NAMES, coco, scene, write_coco

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules import CocoDetection, LargeScaleJitter
from ssmpretrain.datamodules.targets.run_lengths import decode_mask

SMALL: dict[str, Any] = {"batch_size": 4, "num_workers": 0, "image_size": 32, "augmentation": LargeScaleJitter()}


def evaluated(data: CocoDetection) -> dict[str, Any]:
    """Annotation of each validation image, by its key."""
    data.setup("validate")
    return {
        key: one for batch in data.val_dataloader() for key, one in zip(batch["key"], batch["annotation"], strict=True)
    }


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings so far."""
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def both(folder: str, file: str, **options: Any) -> CocoDetection:
    return CocoDetection(folder, file, folder, file, **{**SMALL, **options})


@pytest.mark.parametrize("polygons", [True, False])
def test_evaluation_has_the_objects_at_the_size_of_the_file(tmp_path: Path, polygons: bool) -> None:
    data = both(*write_coco(tmp_path, coco(polygons=polygons)))
    found = evaluated(data)
    assert data.classes == NAMES and data.dropped_objects()["val"] == {}
    for number in range(20):
        pixels, objects = scene(number)
        annotation = found[f"{number:02d}.png"]
        assert (annotation["height"], annotation["width"]) == pixels.shape[:2]
        for one, expected in zip(annotation["objects"], objects, strict=True):
            assert {**one, "segmentation": 0} == {**expected, "segmentation": 0}
            assert (decode_mask(one["segmentation"]) == decode_mask(expected["segmentation"])).all()


def test_boxes_alone_need_no_masks(tmp_path: Path) -> None:
    content = coco()
    for one in content["annotations"]:
        one["segmentation"] = []
    data = both(*write_coco(tmp_path, content))
    data.setup()
    assert data.dropped_objects() == {"train": {}, "val": {}}
    assert all("segmentation" not in one for each in evaluated(data).values() for one in each["objects"])
    batch = next(iter(data.train_dataloader()))
    assert not any("masks" in objects for objects in batch["objects"] if len(objects["boxes"]))


def test_masks_false_reads_no_mask_and_drops_nothing_for_want_of_one(tmp_path: Path) -> None:
    content = coco()
    content["annotations"][0]["segmentation"] = [[1, 2]]
    data = both(*write_coco(tmp_path, content), masks=False)
    assert not any("segmentation" in one for each in evaluated(data).values() for one in each["objects"])
    assert data.dropped_objects()["val"] == {}


def test_images_without_objects_train_unless_they_are_dropped(tmp_path: Path) -> None:
    content = coco()
    crowds = [one for one in content["annotations"] if one["image_id"] == 1001]
    for one in crowds:  # image 1 has a crowd alone; 0, 4, 8, 12 and 16 have nothing
        one["iscrowd"] = 1
    paths = write_coco(tmp_path, content)
    assert both(*paths).num_samples("train") == 20
    data = both(*paths, empty="drop")
    assert data.num_samples("train") == 14 and data.num_samples("val") == 20


def changed(**fields: Any) -> Callable[[dict[str, Any]], None]:
    """Change the first object; a value of `...` removes the field."""

    def change(content: dict[str, Any]) -> None:
        one = content["annotations"][0]
        one.update(fields)
        for name in [name for name, value in fields.items() if value is ...]:
            del one[name]

    return change


UNTRAINABLE = {
    "area 0": ({"area": 0}, "area of 0 or less"),
    "area below 0": ({"area": -5.0}, "area of 0 or less"),
    "narrow box": ({"bbox": [1, 1, 0.5, 9]}, "box narrower or lower than 1 pixel"),
    "negative height": ({"bbox": [1, 1, 5, -9]}, "box narrower or lower than 1 pixel"),
    "box to the right": ({"bbox": [500, 1, 5, 5]}, "box outside of the image"),
    "box above": ({"bbox": [1, -9, 5, 8]}, "box outside of the image"),
}
DROPPED = {
    "area is text": ({"area": "20"}, "area that is no number"),
    "area NaN": ({"area": float("nan")}, "area that is no number"),
    "unknown category": ({"category_id": 6}, "unknown category"),
    "category is text": ({"category_id": "5"}, "unknown category"),
    "category is missing": ({"category_id": ...}, "unknown category"),
    "unknown image": ({"image_id": 1}, "unknown image"),
    "image is a list": ({"image_id": [1000]}, "unknown image"),
    "three numbers": ({"bbox": [1, 2, 3]}, "bbox that is not four finite numbers"),
    "text in a box": ({"bbox": ["1", 2, 3, 4]}, "bbox that is not four finite numbers"),
    "box NaN": ({"bbox": [1, 2, 3, float("nan")]}, "bbox that is not four finite numbers"),
    "box infinite": ({"bbox": [1, 2, float("inf"), 4]}, "bbox that is not four finite numbers"),
    "box of 400 digits": ({"bbox": [1, 2, 10**400, 4]}, "bbox that is not four finite numbers"),
    "no box": ({"bbox": None}, "bbox that is not four finite numbers"),
    "iscrowd 2": ({"iscrowd": 2}, "iscrowd that is neither 0 nor 1"),
    "two points": ({"segmentation": [[1, 2, 3, 4]]}, "polygon of fewer than three points"),
    "flat polygon": ({"segmentation": [1, 2, 3, 4, 5, 6]}, "mask that is neither polygons nor a run-length code"),
    "odd polygon": ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "mask that is neither polygons nor a run-length code"),
    "text in a polygon": ({"segmentation": [["1"] * 6]}, "mask that is neither polygons nor a run-length code"),
    "polygon NaN": (
        {"segmentation": [[float("nan")] * 6]},
        "polygon with a coordinate that is no finite number",
    ),
    "polygon infinite": (
        {"segmentation": [[1, 2, 3, 4, 5, -float("inf")]]},
        "polygon with a coordinate that is no finite number",
    ),
    "polygon very far away": ({"segmentation": [[1, 2, 3, 4, 5, 10**400]]}, "polygon far outside of the image"),
    "polygon far away": ({"segmentation": [[1, 2, 3, 4, 5, 1e9]]}, "polygon far outside of the image"),
    "no mask": ({"segmentation": ...}, "no mask, in a file with masks"),
    "empty mask": ({"segmentation": []}, "no mask, in a file with masks"),
    "mask is text": ({"segmentation": "abc"}, "mask that is neither polygons nor a run-length code"),
    "other size": ({"segmentation": {"size": [3, 3], "counts": [9]}}, "mask of another size than the image"),
    "no size": ({"segmentation": {"counts": "abc"}}, "mask of another size than the image"),
}


@pytest.mark.parametrize("fault", UNTRAINABLE)
def test_an_object_that_does_not_train_is_dropped_from_training_and_stays_in_evaluation(
    tmp_path: Path, fault: str
) -> None:
    change, cause = UNTRAINABLE[fault]
    content = coco(4)
    changed(**change)(content)
    data = both(*write_coco(tmp_path, content, 4))
    data.setup()
    assert data.dropped_objects() == {"train": {cause: 1}, "val": {}}
    one = evaluated(data)["01.png"]["objects"][0]
    assert change.items() <= one.items()
    assert sum(len(objects["boxes"]) for batch in data.train_dataloader() for objects in batch["objects"]) <= 5


@pytest.mark.parametrize("fault", DROPPED)
def test_an_object_that_cannot_be_used_is_dropped_and_counted(
    tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    change, cause = DROPPED[fault]
    content = coco(4)
    changed(**change)(content)
    data = both(*write_coco(tmp_path, content, 4))
    assert sum(len(each["objects"]) for each in evaluated(data).values()) == 5
    assert data.dropped_objects()["val"] == {cause: 1} and data.bad_samples()["val"] == {}
    assert f"CocoDetection: val: instances.json: dropped 1 of 6 objects: {cause} (1)." in lines(caplog)


def test_broken_runs_are_dropped(tmp_path: Path) -> None:
    content = coco(4)
    h, w = (content["images"][1][name] for name in ("height", "width"))
    broken = ["", "####", "04", [h * w + 1], [-1, h * w + 1], ["5"], [10**30], 7]
    for counts in broken:
        content["annotations"].append({**content["annotations"][0], "segmentation": {"size": [h, w], "counts": counts}})
    data = both(*write_coco(tmp_path, content, 4))
    evaluated(data)
    assert data.dropped_objects()["val"] == {"broken run-length code": len(broken)}


def test_what_a_file_lacks_is_mended_and_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = coco(8)
    for one in content["annotations"]:
        del one["area"]
        if one["iscrowd"] == 0:
            del one["iscrowd"]
    content["annotations"][0]["segmentation"].append([1, 1])
    found = evaluated(both(*write_coco(tmp_path, content, 8)))
    for number in range(8):
        assert [one["area"] for one in found[f"{number:02d}.png"]["objects"]] == [
            one["area"] for one in scene(number)[1]
        ]
    assert lines(caplog)[0] == (
        "CocoDetection: val: instances.json: mended objects: no area: that of the mask or the box is taken (12); no "
        "iscrowd: 0 is taken (10); polygons of fewer than three points beside others: left out (1)."
    )


def test_ids_that_occur_twice_are_kept_and_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = coco(4)
    for one in content["annotations"]:
        one["id"] = 7
    found = evaluated(both(*write_coco(tmp_path, content, 4)))
    assert sum(len(one["objects"]) for one in found.values()) == 6
    assert lines(caplog)[:1] == [
        "CocoDetection: val: instances.json: mended objects: id of an earlier object: both are kept, where pycocotools "
        "counts the last one in place of each (5)."
    ]


def test_a_polygon_without_a_pixel_is_dropped_when_it_is_drawn_and_counts_once(tmp_path: Path) -> None:
    content = coco(4)
    changed(segmentation=[[1, 1, 1, 1, 1, 1]])(content)
    paths = write_coco(tmp_path, content, 4)
    data = both(*paths, num_workers=2, batch_size=2)
    data.setup()
    for _ in range(2):
        assert all(len(batch["image"]) for batch in data.train_dataloader())
    assert sum(len(each["objects"]) for each in evaluated(data).values()) == 6  # it counts in evaluation
    assert data.dropped_objects() == {"train": {"mask without a pixel": 1}, "val": {}}
    assert data.dropped_records()[0] == {
        "split": "train",
        "epoch": 0,
        "cause": "mask without a pixel",
        "shard": paths[1],
        "key": "01.png",
        "object": 0,
    }


def test_too_many_dropped_objects_stop_the_run_with_their_causes(tmp_path: Path) -> None:
    content = coco()
    for one in content["annotations"][:11]:  # of 1000 objects at least, one in a hundred may be dropped
        one["bbox"] = [500, 500, 5, 5]
    paths = write_coco(tmp_path, content)
    with pytest.raises(DataError, match=r"11 of 30 objects cannot be used, more than 1.00%: box outside of the image"):
        both(*paths).setup()
    data = both(*paths, max_bad_fraction=0.1)
    data.setup()
    assert data.dropped_objects()["train"] == {"box outside of the image": 11}


def replaced(**lists: Any) -> dict[str, Any]:
    return {**coco(4), **lists}


IMAGE, CATEGORY = coco(1)["images"][0], coco(1)["categories"][0]
WRONG = {  # content of a file: part of the message
    "no JSON": ("<html>", "cannot be read as JSON"),
    "cut off": (json.dumps(coco(4))[:300], "cannot be read as JSON"),
    "no bytes": ("", "cannot be read as JSON"),
    "too deep": ("[" * 200_000, "cannot be read as JSON"),
    "results": ([{"image_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}], "got a list, as results of a detector are"),
    "text": ('"abc"', "is no file of COCO instances; got str"),
    "no images": ({"annotations": [], "categories": []}, "has no list of images"),
    "no annotations": (
        {"images": [IMAGE], "categories": [CATEGORY]},
        "has images without annotations, as the files of",
    ),
    "no categories": ({**coco(4), "categories": None}, "has no list of categories"),
    "captions": (replaced(annotations=[{"image_id": 1, "caption": "a cat"}]), "objects with a bbox; got captions"),
    "keypoints": (replaced(annotations=[{"keypoints": [1, 2, 2]}]), "got keypoints without boxes"),
    "panoptic": (replaced(annotations=[{"segments_info": []}]), "got segments of panoptic segmentation"),
    "empty annotations": (replaced(annotations=[]), "got no annotations"),
    "empty images": (replaced(images=[]), "the list of images is empty"),
    "empty categories": (replaced(categories=[]), "the list of categories is empty"),
    "image twice": (replaced(images=[IMAGE, IMAGE]), r"images\[1\]: each image is listed once; got id 1000 again"),
    "file twice": (replaced(images=[IMAGE, {**IMAGE, "id": 5}]), "got file_name 00.png again"),
    "height is text": (replaced(images=[{**IMAGE, "height": "40"}]), "height and width are positive integers"),
    "height is missing": (replaced(images=[{"id": 1, "file_name": "a.png"}]), "got None and None"),
    "width 0": (replaced(images=[{**IMAGE, "width": 0}]), "height and width are positive integers"),
    "width NaN": (replaced(images=[{**IMAGE, "width": float("nan")}]), "height and width are positive integers"),
    "no file name": (replaced(images=[{"id": 1}]), r"images\[0\]: has an id and a file_name; got {\"id\": 1}"),
    "image is text": (replaced(images=["a.png"]), 'has an id and a file_name; got "a.png"'),
    "outside": (replaced(images=[{**IMAGE, "file_name": "../a.png"}]), "file_name is a path below the folder"),
    "category twice": (replaced(categories=[CATEGORY, CATEGORY]), "each category is listed once; got id 90 again"),
    "name twice": (replaced(categories=[CATEGORY, {**CATEGORY, "id": 8}]), "got name cow again"),
    "category text": (replaced(categories=[{"id": "5", "name": "cat"}]), "an integer of at least 0, and a name"),
    "category without name": (replaced(categories=[{"id": 5}]), "an integer of at least 0, and a name"),
    "all dropped": (replaced(annotations=[{"bbox": [1, 2, 3, 4]}]), r"1 annotations, all dropped: unknown image \(1\)"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_file_gives_one_message(tmp_path: Path, fault: str) -> None:
    content, text = WRONG[fault]
    data = both(*write_coco(tmp_path, content, 4))
    with pytest.raises(DataError, match=text) as error:
        data.setup()
    assert "instances.json" in str(error.value) and str(error.value).endswith(".")


def test_missing_files_and_folders_give_one_message(tmp_path: Path) -> None:
    folder, file = write_coco(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"train: no annotation file .*instances.jso; the folder"):
        CocoDetection(folder, file[:-1], **SMALL).setup()
    with pytest.raises(FileNotFoundError, match="no folder"):
        CocoDetection(folder + "x", file, **SMALL).setup()
    with pytest.raises(DataError, match="annotations are one JSON file; got"):
        CocoDetection(folder, folder, **SMALL).setup()
    with pytest.raises(DataError, match=r"20 of 20 that were looked for are missing, such as 00.png, 01.png"):
        CocoDetection(str(tmp_path), file, **SMALL).setup()


def test_missing_and_wrong_images_are_skipped_and_counted_by_cause(tmp_path: Path) -> None:
    folder, file = write_coco(tmp_path)
    images = Path(folder)
    (images / "03.png").unlink()
    (images / "04.png").write_bytes((images / "05.png").read_bytes())
    (images / "06.png").write_bytes(b"<html>")
    (images / "07.png").write_bytes((images / "07.png").read_bytes()[:80])
    data = CocoDetection(folder, file, **SMALL)
    data.setup()
    assert all(len(batch["image"]) == 4 for batch in data.train_dataloader())
    counts = {cause: sum(files.values()) for cause, files in data.bad_samples()["train"].items()}
    assert counts == {"missing images": 1, "annotations of another size": 1, "undecodable images": 2}


def test_validation_with_other_ids_is_matched_by_the_names(tmp_path: Path) -> None:
    train, content = write_coco(tmp_path / "train"), coco()
    content["categories"] = [{"id": number, "name": name} for number, name in ((90, "cat"), (1, "dog"), (5, "cow"))]
    for one in content["annotations"]:
        one["category_id"] = {5: 90, 7: 1, 90: 5}[one["category_id"]]
    val = write_coco(tmp_path / "val", content)
    data = CocoDetection(*train, *val, **SMALL)
    data.setup()
    assert [one["category"] for one in evaluated(data)["03.png"]["objects"]] == [0, 1, 2]
    content["categories"][0]["name"] = "horse"
    write_coco(tmp_path / "val", content)
    with pytest.raises(DataError, match=r"got horse, which the latter lacks"):
        CocoDetection(*train, *val, **SMALL).setup()


def test_polygons_without_pycocotools_give_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_coco(tmp_path)
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    with pytest.raises(DataError, match=r"pip install ssmpretrain\[detection\]"):
        CocoDetection(*paths, **SMALL).setup()
    CocoDetection(*paths, masks=False, **SMALL).setup()


def test_arguments_that_contradict_each_other_give_one_message(tmp_path: Path) -> None:
    folder, file = write_coco(tmp_path)
    with pytest.raises(DataError, match=r"got val alone. Give val_annotations too"):
        CocoDetection(folder, file, folder, **SMALL)
    with pytest.raises(DataError, match="empty is keep or drop"):
        CocoDetection(folder, file, empty="no", **SMALL)
    with pytest.raises(DataError, match="num_classes is the number of the classes; got 5, and 3 names"):
        CocoDetection(folder, file, num_classes=5, **SMALL).setup()
    CocoDetection(folder, file, classes=[*NAMES, "more"], num_classes=4, **SMALL).setup()  # the file names some of them


def test_worker_processes_share_the_annotations(tmp_path: Path) -> None:
    paths = write_coco(tmp_path)
    alone, helped = (
        [
            batch
            for _ in range(2)
            for batch in CocoDetection(*paths, **{**SMALL, "num_workers": workers}).train_dataloader()
        ]
        for workers in (0, 2)
    )
    for one, other in zip(alone, helped, strict=True):
        assert one["key"] == other["key"] and torch.equal(one["image"], other["image"])
        for mine, theirs in zip(one["objects"], other["objects"], strict=True):
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)
