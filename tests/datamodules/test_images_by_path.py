"""Images that a person names: a folder with or without classes, files, patterns, shards."""

import os
from pathlib import Path

import pytest
from mean_colour import paint

from ssmpretrain.base.errors import DataError
from ssmpretrain.cli import main
from ssmpretrain.datamodules.images_by_path import NamedImages

RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes of one image each, the red one at depth 2, in the folder `images` of the working folder."""
    monkeypatch.chdir(tmp_path)
    paint(tmp_path / "images" / "warm" / "deep" / "red.png", RED)
    paint(tmp_path / "images" / "cold" / "blue.png", BLUE)
    return tmp_path / "images"


def keys_and_labels(*paths: str) -> tuple[list[str], list[int], list[str]]:
    module = NamedImages(paths, "neighbours", image_size=32, num_workers=0)
    module.setup("validate")
    batches = list(module.val_dataloader())
    return (
        [key for batch in batches for key in batch["key"]],
        [label for batch in batches for label in batch["label"].tolist()],
        module.classes,
    )


def test_sub_folders_of_a_single_folder_are_classes(folder: Path) -> None:
    assert keys_and_labels("images") == (["cold/blue.png", "warm/deep/red.png"], [0, 1], ["cold", "warm"])


@pytest.mark.parametrize(
    ("paths", "keys"),
    [
        (("images/warm/deep/red.png", "images/cold"), ["warm/deep/red.png", "cold/blue.png"]),
        (("images/**/*.png",), ["cold/blue.png", "warm/deep/red.png"]),
        (("images/cold/blue.png", "images/cold"), ["blue.png"]),
        (("images/cold",), ["blue.png"]),
    ],
)
def test_files_and_patterns_have_no_classes_and_keep_their_order(
    folder: Path, paths: tuple[str, ...], keys: list[str]
) -> None:
    assert keys_and_labels(*paths) == (keys, [-1] * len(keys), [])


def test_a_file_that_a_person_names_needs_no_suffix(folder: Path) -> None:
    os.rename(folder / "cold" / "blue.png", folder / "cold" / "blue")
    assert keys_and_labels("images/cold/blue") == (["blue"], [-1], [])


def test_shards_keep_their_labels(folder: Path) -> None:
    assert main(["shards", "pack", "images", "shards"]) == 0
    keys, labels, classes = keys_and_labels("shards")
    assert dict(zip(keys, labels, strict=True)) == {"cold/blue": 0, "warm/deep/red": 1} and classes == ["cold", "warm"]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (("images", "a.tar"), "neighbours: images are all in shards, or all in files and folders; got images a.tar"),
        (("images/*.jpg",), "neighbours: no file matches images/\\*.jpg"),
        (("image",), "neighbours: no file or folder image; the folder .* holds 1 folder"),
        ((), "neighbours: images are"),
    ],
)
def test_paths_that_name_no_images_are_refused(folder: Path, paths: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        keys_and_labels(*paths)


def test_an_empty_folder_says_what_it_holds(folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "empty" / "notes.txt").touch()
    with pytest.raises(DataError, match=r"no image .* in images/empty, which holds 1 \.txt"):
        keys_and_labels("images/empty")


def test_a_file_has_one_identity_and_the_class_of_its_folder(folder: Path) -> None:
    whole, files = (NamedImages([path], "neighbours", image_size=32) for path in ("images", "images/*/*.png"))
    assert files.identity("blue.png") == whole.identity("cold/blue.png") == str((folder / "cold/blue.png").resolve())
    assert whole.class_of(files.identity("blue.png")) == "cold"
    assert whole.class_of(str(folder.parent / "other.png")) is None
