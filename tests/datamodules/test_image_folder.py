import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from ssmpretrain.datamodules import ImageFolder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, count in (("train", 10), ("val", 3)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (12, 9), (number * 20, 0, 0)).save(tmp_path / split / name / f"{number}.PNG")
    return tmp_path


def data(folder: Path, **options) -> ImageFolder:
    return ImageFolder(**{"train": f"{folder}/train", "batch_size": 4, "num_workers": 0, "image_size": 8, **options})


def test_class_folders_are_labels_and_validation_is_in_order(folder: Path) -> None:
    images = data(folder, val=f"{folder}/val")
    images.setup("fit")
    assert images.classes == ["cat", "dog"]
    batches = list(images.val_dataloader())
    assert [key for batch in batches for key in batch["key"]] == sorted(
        f"{name}/{number}.PNG" for name in ("cat", "dog") for number in range(3)
    )
    assert torch.cat([batch["label"] for batch in batches]).tolist() == [0, 0, 0, 1, 1, 1]
    assert batches[0]["image"].shape == (4, 3, 8, 8)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_shuffles_all_files_anew_each_epoch(folder: Path, num_workers: int) -> None:
    loader = data(folder, num_workers=num_workers).train_dataloader()
    epochs = [[key for batch in loader for key in batch["key"]] for _ in range(2)]
    assert set(epochs[0]) == set(epochs[1]) and len(epochs[0]) == len(set(epochs[0])) == 20
    assert epochs[0] != epochs[1]


def test_a_flat_folder_is_unlabelled(folder: Path) -> None:
    images = data(folder, train=f"{folder}/train/cat")
    assert images.classes == []
    assert all(batch["label"].tolist() == [-1] * 4 for batch in images.train_dataloader())


def test_bad_files_are_skipped_and_counted(folder: Path) -> None:
    (folder / "train" / "cat" / "x.jpg").write_bytes(b"no image")
    (folder / "train" / "cat" / "y.jpg").symlink_to(folder / "missing.jpg")
    images = data(folder)
    assert sum(len(batch["key"]) for batch in images.bank_dataloader()) == 20
    assert {cause: sum(files.values()) for cause, files in images.bad_samples()["bank"].items()} == {
        "undecodable images": 1,
        "unreadable files": 1,
    }


@pytest.mark.parametrize("loader", ["bank_dataloader", "val_dataloader"])
def test_a_limit_covers_all_classes(folder: Path, loader: str) -> None:
    batches = getattr(data(folder, val=f"{folder}/train"), loader)(limit=6)
    labels = torch.cat([batch["label"] for batch in batches])
    assert labels.bincount().tolist() == [3, 3]


def test_a_folder_is_read_once_whatever_links_lead_to_it(folder: Path, tmp_path_factory, caplog) -> None:
    train, disk = folder / "train", tmp_path_factory.mktemp("disk")
    (disk / "bird").mkdir()
    Image.new("RGB", (12, 9)).save(disk / "bird" / "0.png")
    (disk / "bird" / "disk").symlink_to(disk)  # to what holds the link
    (disk / "bird" / "data").symlink_to(folder)  # to what holds the data
    (train / "bird").symlink_to(disk / "bird")
    (train / "cat" / "all").symlink_to(train)
    (train / "cat" / "up").symlink_to("../..")
    (train / "aaa").symlink_to(train / "dog")  # sorts first, and is no class
    (train / "dog" / "itself").symlink_to("itself")
    (train / "dog" / "again.png").symlink_to(train / "cat" / "0.PNG")
    (train / ".hidden").mkdir()
    Image.new("RGB", (12, 9)).save(train / ".hidden" / "0.png")
    (train / "fish").symlink_to(".hidden")
    images = data(folder)
    assert images.num_samples("train") == 23 and images.classes == ["bird", "cat", "dog", "fish"]
    left = "left out 5: folders that are read already, or hold this one: aaa, cat/all, cat/up and 2 more."
    assert caplog.messages == [f"ImageFolder: train: {left}"]


def test_only_files_are_read(folder: Path, caplog) -> None:
    cat = folder / "train" / "cat"
    os.mkfifo(cat / "pipe.jpg")
    (cat / "zero.png").symlink_to("/dev/zero")
    images = data(folder)
    assert sum(len(batch["key"]) for batch in images.bank_dataloader()) == 20
    assert "left out 2: pipes, sockets and devices: cat/pipe.jpg, cat/zero.png." in caplog.text
    for name in ("0.PNG", "1.PNG"):  # after they were listed
        (cat / name).unlink()
    os.mkfifo(cat / "0.PNG")
    (cat / "1.PNG").symlink_to("/dev/zero")
    assert sum(len(batch["key"]) for batch in images.bank_dataloader()) == 18
    assert [record["detail"] for record in images.bad_records()] == ["Not a regular file"] * 2


def test_a_folder_without_images_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "a.tiff").touch()
    (tmp_path / "b.tiff").touch()
    with pytest.raises(ValueError, match=r"ImageFolder: train: no image .* which holds 2 \.tiff"):
        ImageFolder(str(tmp_path)).setup("fit")
    with pytest.raises(FileNotFoundError, match=r"no folder .*nothing; the folder .* holds 2 \.tiff"):
        ImageFolder(str(tmp_path / "nothing")).setup("fit")


def test_a_folder_of_broken_images_is_an_error(tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / f"{number}.jpg").write_bytes(b"no image")
    with pytest.raises(
        ValueError, match=r"none of 8 samples .*: 8 undecodable images in 1 file, .* 0.jpg in .*: undec"
    ):
        data(tmp_path, train=str(tmp_path)).setup("fit")
    with pytest.raises(ValueError, match=r"no sample of .* is usable: 8 undecodable images in 1 file,"):
        list(data(tmp_path, train=str(tmp_path)).train_dataloader())


def test_classes_of_validation_that_training_lacks_are_named(folder: Path) -> None:
    (folder / "val" / "dog").rename(folder / "val" / "wolf")
    images = data(folder, val=f"{folder}/val")
    images.setup("fit")  # whoever reads no label trains
    with pytest.raises(ValueError, match=r"got wolf, which .* lacks"):
        images.use_labels()
