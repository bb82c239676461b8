"""Shards with objects: the order, resume and counts of other shards, and what happens to wrong annotations."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from coco_folder import NAMES, coco, sample, scene, write_coco, write_shards

from ssmpretrain.base.errors import DataError
from ssmpretrain.cli import main
from ssmpretrain.datamodules import CocoDetection, DetectionShards, LargeScaleJitter, MultiScaleResize

SMALL: dict[str, Any] = {"batch_size": 4, "num_workers": 0, "image_size": 32, "augmentation": LargeScaleJitter()}


def equal(batch: dict[str, Any], other: dict[str, Any]) -> bool:
    same = all(torch.equal(batch[name], other[name]) for name in ("image", "size", "whole_size"))
    pairs = zip(batch["objects"], other["objects"], strict=True)
    objects = all(one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one) for one, two in pairs)
    return same and objects and batch["key"] == other["key"]


def epochs(data: DetectionShards, count: int = 2) -> list[dict[str, Any]]:
    loader = data.train_dataloader()
    return [batch for _ in range(count) for batch in loader]


def test_a_batch_has_objects_of_the_size_of_its_images(tmp_path: Path) -> None:
    folder = write_shards(tmp_path)
    data = DetectionShards(folder, folder, **SMALL)
    data.setup()
    assert data.classes == NAMES and data.image_size == (32, 32) and data.eval_size == (32, 32)
    for batch in data.train_dataloader():
        assert batch["image"].shape == (4, 3, 32, 32) and batch["size"].dtype == torch.int64
        for objects, (h, w) in zip(batch["objects"], batch["size"].tolist(), strict=True):
            n = len(objects["boxes"])
            assert objects["boxes"].shape == (n, 4) and objects["boxes"].dtype == torch.float32
            assert objects["masks"].shape == (n, 32, 32) and objects["masks"].dtype == torch.bool
            assert objects["classes"].dtype == torch.int64 and objects["crowd"].dtype == torch.bool
            assert objects["crowd"].tolist() == [number == 2 for number in objects["classes"].tolist()]
            assert not objects["masks"][:, h:].any() and not objects["masks"][:, :, w:].any()
            assert (objects["boxes"] >= 0).all() and (objects["boxes"] <= torch.tensor([w, h, w, h])).all()


def test_evaluation_scales_the_boxes_and_keeps_the_annotation_of_the_file(tmp_path: Path) -> None:
    folder = write_shards(tmp_path)
    data = DetectionShards(folder, folder, **{**SMALL, "eval_size": (40, 100)})
    data.setup()
    found = [
        one
        for batch in data.val_dataloader()
        for one in zip(batch["annotation"], batch["objects"], batch["size"], batch["whole_size"], strict=True)
    ]
    for number, (annotation, objects, size, whole) in enumerate(found):
        pixels, expected = scene(number)
        assert annotation["objects"] == expected and whole.tolist() == list(pixels.shape[:2])
        assert min(size.tolist()) == 40 and "masks" not in objects
        boxes = torch.tensor([one["bbox"] for one in expected], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        ratio = (size / whole).flip(0).repeat(2)
        assert torch.allclose(objects["boxes"].double(), boxes * ratio, atol=1e-4)


def test_any_number_of_workers_gives_the_same_batches(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, {5: {"json": b"{"}})
    alone = epochs(DetectionShards(folder, **SMALL))
    helped = epochs(DetectionShards(folder, **{**SMALL, "num_workers": 2}))
    assert len(alone) == 10 and all(equal(*pair) for pair in zip(alone, helped, strict=True))
    assert not torch.equal(alone[0]["image"], alone[5]["image"])


def test_a_run_that_stopped_goes_on_to_the_bit(tmp_path: Path) -> None:
    sides: Any = {"short_sides": [24, 32], "longest": 64, "crop_probability": 0.5, "crop_short_sides": [28]}
    multi = MultiScaleResize(crop_sides=(16, 24), **sides)
    options = {**SMALL, "image_size": None, "augmentation": multi}
    folder = write_shards(tmp_path)
    whole = epochs(DetectionShards(folder, **options))
    data = DetectionShards(folder, **options)
    loader = iter(data.train_dataloader())
    begun = [next(loader) for _ in range(3)]
    state = json.loads(json.dumps(data.state_dict()))
    further = DetectionShards(folder, **options)
    further.load_state_dict(state)
    rest = epochs(further)
    assert all(equal(*pair) for pair in zip([*begun, *rest], whole, strict=True))


def test_two_ranks_share_the_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_shards(tmp_path)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    trained, evaluated = [], []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        data = DetectionShards(folder, folder, **{**SMALL, "batch_size": 3})
        data.setup()
        trained += [key for batch in data.train_dataloader() for key in batch["key"]]
        evaluated += [key for batch in data.val_dataloader() for key in batch["key"]]
    assert len(trained) == len(set(trained)) == 18
    assert sorted(evaluated) == [f"{number:02d}" for number in range(20)]


def annotation(**changes: Any) -> bytes:
    """The annotation of scene 5, which has one object, with changes of the object."""
    content = json.loads(sample(5)["json"])
    content["objects"][0].update(changes)
    return json.dumps(content).encode()


H, W = scene(5)[0].shape[:2]
WRONG = {  # annotation of sample 5: cause
    "no JSON": (b"<html>", "undecodable annotations"),
    "a list": (b"[]", "images without an annotation"),
    "a caption": (b'{"caption": "a cat", "height": 5, "width": 5}', "images without an annotation"),
    "objects are text": (json.dumps({"height": H, "width": W, "objects": "no"}).encode(), "undecodable annotations"),
    "turned": (json.dumps({"height": W, "width": H, "objects": []}).encode(), "annotations of another size"),
    "class 3": (annotation(category=3), "bad categories"),
    "class -1": (annotation(category=-1), "bad categories"),
    "a name": (annotation(category="cat"), "bad categories"),
    "three numbers": (annotation(bbox=[1, 1, 5]), "bad boxes"),
    "box NaN": (annotation(bbox=[1, 1, float("nan"), 5]), "bad boxes"),
    "area is text": (annotation(area="5"), "undecodable annotations"),
    "polygon": (annotation(segmentation=[[1, 2, 3, 4, 5, 6]]), "bad masks"),
    "other size": (annotation(segmentation={"size": [1, 1], "counts": "1"}), "masks of another size"),
    "cut mask": (annotation(segmentation={"size": [H, W], "counts": "0"}), "bad masks"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_annotation_is_skipped_and_counted_and_found_by_verify(
    tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content, cause = WRONG[fault]
    folder = write_shards(tmp_path, {5: {"json": content}})
    data = DetectionShards(folder, **SMALL)
    data.setup()
    assert all(len(batch["image"]) == 4 for batch in data.train_dataloader())
    assert list(data.bad_samples()["train"]) == [cause]
    assert main(["shards", "verify", folder, "--workers", "1"]) == 2
    assert "problems: 1" in capsys.readouterr().out


def test_the_classes_are_named_once(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, names=None)
    with pytest.raises(DataError, match="Give the names as classes, or their number as num_classes"):
        DetectionShards(folder, **SMALL).setup()
    DetectionShards(folder, num_classes=3, **SMALL).setup()
    with pytest.raises(DataError, match="got 5, and 3 names"):
        DetectionShards(write_shards(tmp_path / "named"), num_classes=5, **SMALL).setup()


def test_shards_without_annotations_are_wrong(tmp_path: Path) -> None:
    from ssmpretrain.datamodules.shards import ShardWriter

    with ShardWriter(tmp_path, "none") as writer:
        writer.write("0", {"png": sample(0)["png"]})
    with pytest.raises(DataError, match=r"no annotation \(.json\) in 1 of 1 shards"):
        DetectionShards(str(tmp_path), num_classes=3, **SMALL).setup()


def test_a_coco_folder_and_the_shards_packed_from_it_give_the_same_objects(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = coco()
    content["annotations"][0]["category_id"] = 6
    content["annotations"][1]["area"] = 0
    folder, file = write_coco(tmp_path, content)
    (Path(folder) / "19.png").unlink()
    out = str(tmp_path / "shards")
    assert main(["shards", "pack", folder, out, "--annotations", file]) == 2
    said = capsys.readouterr().out
    assert "packed 19 images, 26 objects of 3 classes (1 dropped: unknown category (1)), into 1 shards" in said
    assert f"left out 1: missing images: 19.png: no {folder}/19.png" in said
    assert main(["shards", "verify", out]) == 0
    loose, packed = CocoDetection(folder, file, folder, file, **SMALL), DetectionShards(out, out, **SMALL)
    loose.setup()
    packed.setup()
    assert loose.classes == packed.classes == NAMES
    by_key: list[dict[str, Any]] = [
        {
            Path(key).stem: one
            for batch in data.val_dataloader()
            for key, one in zip(batch["key"], batch["annotation"], strict=True)
        }
        for data in (loose, packed)
    ]
    assert by_key[0] == by_key[1] and len(by_key[0]) == 19


def test_packing_numbers_the_classes_by_a_list(tmp_path: Path) -> None:
    folder, file = write_coco(tmp_path)
    (tmp_path / "names.txt").write_text("cow\nsheep\ndog\ncat\n")
    out = str(tmp_path / "shards")
    assert main(["shards", "pack", folder, out, "--annotations", file, "--classes", str(tmp_path / "names.txt")]) == 0
    data = DetectionShards(out, out, **SMALL)
    data.setup()
    assert data.classes == ["cow", "sheep", "dog", "cat"]
    found = {
        key: one for batch in data.val_dataloader() for key, one in zip(batch["key"], batch["annotation"], strict=True)
    }
    assert [one["category"] for one in found["03"]["objects"]] == [3, 2, 0]


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--masks", "."], "--annotations packs objects, and --masks class maps; got both"),
        (["--num-classes", "3"], "--num-classes is for images with masks"),
        (["--classes", "names.txt"], "got cat, dog, cow, which the latter lacks"),
    ],
)
def test_packing_refuses_options_that_contradict_the_annotations(
    tmp_path: Path, more: list[str], text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = write_coco(tmp_path)
    (tmp_path / "names.txt").write_text("sheep\n")
    monkeypatch.chdir(tmp_path)
    assert main(["shards", "pack", folder, "out", "--annotations", file, *more]) == 2
    assert text in capsys.readouterr().err and not list(tmp_path.glob("out/*.tar"))


def test_packing_follows_links_out_of_the_folder_only_if_asked(tmp_path: Path) -> None:
    folder, file = write_coco(tmp_path)
    image = Path(folder) / "03.png"
    image.rename(tmp_path / "away.png")
    image.symlink_to(tmp_path / "away.png")
    assert main(["shards", "pack", folder, str(tmp_path / "a"), "--annotations", file]) == 2
    assert main(["shards", "pack", folder, str(tmp_path / "b"), "--annotations", file, "--follow-links"]) == 0
