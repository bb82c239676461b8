"""Arguments of data modules, and labels that are known before an epoch is trained."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torchvision.io import encode_png

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules import ImageFolder, ImageShards
from ssmpretrain.datamodules.image_data import ImageData

MakeShards = Callable[..., Path]
PNG = encode_png(torch.zeros(3, 12, 12, dtype=torch.uint8)).numpy().tobytes()


def known(data: ImageData, split: str = "val") -> dict[str, int]:
    return dict(data.known_labels(split))


def folder(path: Path, *names: str) -> str:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(PNG)
    return str(path)


def test_of_a_folder_all_labels_are_known(tmp_path: Path) -> None:
    train = folder(tmp_path / "train", "a/0.png", "b/1.png", "b/2.png", "c/2.png")
    val = folder(tmp_path / "val", "a/0.png", "c/1.png")
    data = ImageFolder(train, val)
    assert known(data, "train") == {"a/0.png": 0, "b/1.png": 1, "c/2.png": 2}
    assert known(data) == {"a/0.png": 0, "c/1.png": 2} and known(ImageFolder(train)) == {}
    folder(tmp_path / "val", "stray.png", "z.png")
    assert known(ImageFolder(train, val)) == {"stray.png and 1 more": -1, "a/0.png": 0, "c/1.png": 2}
    assert known(ImageFolder(train, val, require_labels=True)) == {"a/0.png": 0, "c/1.png": 2}


@pytest.mark.parametrize("indexed", [True, False])
def test_of_shards_the_headers_count_labels_and_a_few_are_read(indexed: bool, make_shards: MakeShards) -> None:
    shards = make_shards([300, 5], bad={207: {"png": PNG}, 302: {"txt": b"no image"}, 303: {"png": PNG, "cls": b"cat"}})
    if not indexed:
        (shards / "train-000000.index.json").unlink()
    found = known(ImageShards(f"{shards}/train-*.tar"), "train")
    assert found.pop(f"1 sample in {shards}/train-000000.tar") == -1
    assert len(found) == 16 and found[f"0000 in {shards}/train-000000.tar"] == 0 and min(found.values()) >= 0
    few = ImageShards(f"{shards}/train-000001.tar")
    few.use_labels()  # what cannot be read is a bad sample then, as is one without an image
    assert list(known(few, "train").values()) == [0, 1, 4]


@pytest.mark.parametrize("ratio", [0.0, 1e-6, 1e-300, 5e-324, 0.02, 1.5, float("nan"), float("inf")])
def test_an_evaluation_crop_for_which_images_become_giant_is_refused(ratio: float, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ImageFolder: .*eval_crop_ratio.*; got .* Use 0\.875, say\."):
        ImageFolder(str(tmp_path), image_size=224, eval_crop_ratio=ratio)
    ImageFolder(str(tmp_path), image_size=224, eval_crop_ratio=0.05)
