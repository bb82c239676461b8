"""`shards pack` and `shards verify` of images with masks."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssmpretrain.cli import main
from ssmpretrain.datamodules.shards import ShardWriter


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    """Twelve images in the layout "folders", training alone, with classes 0 to 2 and pixels to ignore."""
    for kind, pixels in (("images", np.zeros((6, 9, 3), np.uint8)), ("masks", np.arange(54).reshape(6, 9) % 3)):
        (tmp_path / "data" / kind / "train").mkdir(parents=True)
        for number in range(12):
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "data" / kind / "train" / f"{number:02d}.png")
    (tmp_path / "data/classes.json").write_text('["road", "sky", "tree"]')
    return tmp_path / "data"


def test_a_layout_is_packed_part_by_part(data_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack = ["shards", "pack", str(data_set), str(tmp_path / "out"), "--layout", "folders"]
    assert main(pack) == 2
    assert "Add --split train or --split val" in capsys.readouterr().err
    assert main([*pack, "--split", "train", "--prefix", "train"]) == 0
    assert "packed 12 images, masks of 3 classes, into 1 shards" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/classes.json").read_text()) == ["road", "sky", "tree"]
    assert main(["shards", "verify", str(tmp_path / "out")]) == 0
    assert "12 samples: all good" in capsys.readouterr().out


def test_what_cannot_be_packed_is_left_out_by_cause(
    data_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    masks = data_set / "masks/train"
    (masks / "00.png").unlink()
    Image.new("L", (9, 9)).save(masks / "01.png")
    Image.new("RGB", (9, 6)).save(masks / "02.png")
    Image.new("L", (9, 6), 3).save(masks / "03.png")
    (masks / "04.png").write_bytes(b"")
    Image.new("L", (9, 6)).save(masks / "extra.png")
    out = tmp_path / "out"
    options = ["--masks", str(masks), "--num-classes", "3"]
    assert main(["shards", "pack", str(data_set / "images/train"), str(out), *options]) == 2
    said = capsys.readouterr().out
    assert "packed 7 images" in said
    for line in (
        f"left out 1: images without a mask: 00.png: no {masks}/00.png",
        "left out 1: masks of another size: 01.png: image 9 x 6, mask 9 x 9 pixels",
        "left out 1: masks in colours: 02.png",
        "left out 1: numbers without a class: 03.png: 3 at 54 pixels",
        "left out 1: masks that are no PNG: 04.png: 0 bytes",
        "left out 1: masks without an image: extra.png",
    ):
        assert line in said
    assert "masks of 3 classes without names (num_classes: 3)" in said
    assert main(["shards", "verify", str(out)]) == 0


def test_images_without_the_ending_are_no_fault(
    data_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, masks = data_set / "images/train", data_set / "masks/train"
    for number in range(12):
        (images / f"{number:02d}.png").rename(images / f"{number:02d}_rgb.png")
    Image.new("L", (9, 6)).save(images / "00_depth.png")
    pack = ["shards", "pack", str(images), str(tmp_path / "out"), "--masks", str(masks), "--num-classes", "3"]
    assert main([*pack, "--image-ending", "_rgb"]) == 0
    assert "left out 1: images whose names do not end in _rgb: 00_depth.png" in capsys.readouterr().out


def test_an_unreadable_mask_is_told_from_an_unreadable_image(
    data_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = data_set / "masks/train/03.png"
    mask.unlink()
    mask.mkdir()
    Image.new("RGB", (9, 6)).save(data_set / "images/train/04.jpg")
    pack = ["shards", "pack", str(data_set), str(tmp_path / "out"), "--layout", "folders", "--split", "train"]
    assert main(pack) == 2
    said = capsys.readouterr().out
    assert f"left out 1: unreadable masks: 03.png: {mask}: Not a regular file" in said
    assert (
        f"note: 2 images share their mask with another image, such as 04.jpg, 04.png, whose mask is {mask.parent}"
        in said
    )


def test_verify_lists_wrong_class_maps(data_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = (data_set / "images/train/00.png").read_bytes()
    mask = (data_set / "masks/train/00.png").read_bytes()
    Image.new("L", (9, 6), 7).save(tmp_path / "seven.png")
    fields = [
        {"png": image, "seg.png": mask},
        {"png": image},
        {"png": image, "seg.png": (tmp_path / "seven.png").read_bytes()},
        {"png": image, "seg.png": mask[:50]},
    ]
    with ShardWriter(tmp_path / "bad", "train") as writer:
        for number, each in enumerate(fields):
            writer.write(str(number), each)
    (tmp_path / "bad/classes.json").write_text('["road", "sky", "tree"]')
    assert main(["shards", "verify", str(tmp_path / "bad")]) == 2
    said = capsys.readouterr().out
    assert "1  images without a mask: train-000000.tar: 1" in said
    assert "1  numbers without a class: train-000000.tar: 2 (7 at 54 pixels; " in said and "names 3 classes)" in said
    assert "1  undecodable masks: train-000000.tar: 3" in said
    assert "problems: 3" in said
    assert main(["shards", "verify", "--fast", str(tmp_path / "bad")]) == 2
    assert "problems: 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ignore", "3"], "--ignore is for images with masks. Add --masks FOLDER, or --layout NAME"),
        (["--split", "train"], "--split is a part of a data set with --layout"),
        (["--layout", "ade", "--split", "train"], "Did you mean 'ade20k'"),
        (["--masks", "{folder}/masks/train", "--class-map", "x"], "expected JSON with the class of each number"),
        (["--masks", "{folder}/masks/train", "--mask", "a.png"], "mask is a template of a PNG file with {stem}"),
        (["--masks", "{folder}/masks/val"], "no folder"),
        (["--masks", "{folder}/masks/train", "--class-map", '{"0": 255, "1": 255, "2": 255}'], "got no class for any"),
        (["--masks", "{folder}/masks/train", "--num-classes", "0"], "there are 1 to 255 classes"),
        (
            ["--masks", "{folder}/masks/train", "--num-classes", "3", "--class-map", '{"0": "a", "1": "b", "2": "a"}'],
            "num_classes is the number of the classes; got 3, and 2 names in",
        ),
        (["--masks", "{folder}/masks/train", "--class-map", '{"0": 300}'], "got 0: 300"),
        (["--masks", "{folder}/masks/train", "--class-map", '{"0": null}'], "got None for 0"),
    ],
)
def test_wrong_options_give_one_message(
    data_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    folder = data_set / "images/train"
    options = [option.replace("{folder}", str(data_set)) for option in options]
    assert main(["shards", "pack", str(folder), str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
