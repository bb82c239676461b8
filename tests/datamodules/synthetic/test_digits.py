import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules import Digits
from ssmpretrain.datamodules.shards.pack import ShardWriter
from ssmpretrain.datamodules.synthetic.digits import draw

FEW = {"train_images": 48, "val_images": 20, "image_size": 32, "batch_size": 16, "num_workers": 0}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SSMPRETRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_digits_are_packed_once_and_read_as_labelled_images(cache: Path) -> None:
    data = Digits(**FEW)
    data.prepare_data()
    data.setup("fit")
    assert (data.num_samples("train"), data.num_samples("val")) == (48, 20)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (16, 3, 32, 32)
    assert set(batch["label"].tolist()) <= set(range(10))
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*.tar")}
    Digits(**FEW).prepare_data()
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.tar")} == before
    assert [path.name for path in cache.iterdir()] == [data.folder.name]


def test_validation_shows_the_whole_packed_image() -> None:
    data = Digits(**FEW, mean=(0, 0, 0), std=(1, 1, 1))
    image, label = next(draw("val", 1, 32, 0))
    batch = next(iter(data.val_dataloader()))
    assert batch["label"][0] == label
    torch.testing.assert_close(batch["image"][0], image / 255, atol=1e-6, rtol=0)  # one float32 rounding below 1


def test_pictures_are_a_function_of_the_seed_and_every_class_is_there() -> None:
    first, again, other = (list(draw("train", 100, 32, seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for (a, _), (b, _) in zip(first, other, strict=True))
    assert len(Counter(label for _, label in first)) == 10


def test_arguments_that_decide_the_pictures_decide_the_folder() -> None:
    folders = {
        Digits(**{**FEW, **change}).folder
        for change in ({}, {"digits_seed": 1}, {"image_size": 48}, {"val_images": 9}, {"ink": "coloured"})
    }
    assert len(folders) == 5
    assert Digits(**FEW, seed=3).folder == Digits(**FEW).folder


def test_coloured_ink_is_darker_than_its_paper_and_colours_say_nothing_about_the_digit() -> None:
    brightest_ink, colours = 0.0, set()
    for image, _ in draw("train", 60, 32, 0, "coloured"):
        gray = image.float().mean(0)
        corners = gray[[0, 0, -1, -1], [0, -1, 0, -1]]  # a digit covers three of them at most
        assert gray.min() < corners.max() - 40
        brightest_ink = max(brightest_ink, gray.min().item())
        colours.add(int(image.float().mean(dim=(1, 2)).argmax()))
    assert brightest_ink < 160 and colours == {0, 1, 2}


def test_splits_share_no_handwriting() -> None:
    parts = {"train": 1437, "val": 360}  # four fifths of 1797, and the rest: each digit once
    shown = [Counter(label for _, label in draw(split, count, 32, 0)) for split, count in parts.items()]
    assert shown[0] + shown[1] == Counter(load_digits().target.tolist())


def test_an_unknown_ink_is_refused() -> None:
    with pytest.raises(DataError, match="ink is white or coloured; got 'red'"):
        Digits(**FEW, ink="red")  # type: ignore[arg-type]


def test_processes_that_pack_at_once_leave_one_whole_folder(cache: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: Digits(**FEW).prepare_data(), range(3)))
    assert len(list(cache.iterdir())) == 1
    assert Digits(**FEW).num_samples("train") == 48


def test_an_interrupted_packing_leaves_nothing_that_looks_whole(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: ShardWriter, key: str, fields: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ShardWriter, "write", interrupt)
        Digits(**FEW).prepare_data()
    assert list(cache.iterdir()) == []
    assert Digits(**FEW).num_samples("val") == 20


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SSMPRETRAIN_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"file cannot be written .* Set SSMPRETRAIN_CACHE"):
        Digits(**FEW).prepare_data()


def test_a_read_only_cache_names_the_variable(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    cache.chmod(0o555)
    if os.access(cache, os.W_OK):  # root writes everywhere
        pytest.skip("this user may write to read-only folders")
    with pytest.raises(ValueError, match="Set SSMPRETRAIN_CACHE"):
        Digits(**FEW).prepare_data()


@pytest.mark.parametrize("name", ["train_images", "val_images", "image_size"])
def test_a_size_out_of_range_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"Digits: {name} is a number of at least"):
        Digits(**{name: 0})
