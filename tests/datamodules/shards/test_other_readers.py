"""A packed folder is read by timm, open_clip's trainer and Hugging Face's datasets; files of others stay."""

import argparse
import importlib.machinery
import json
import subprocess
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data
import yaml
from PIL import Image
from webdataset.tariterators import tar_file_expander

from ssmpretrain.datamodules.files.image_files import find_images
from ssmpretrain.datamodules.shards.describe import load_index
from ssmpretrain.datamodules.shards.folder_index import write_folder_indexes
from ssmpretrain.datamodules.shards.pack import ShardWriter, pack_folder

SUFFIXES = ("jpg", "JPEG", "jpeg", "jpg")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Shards train and val of twelve and four JPEG images with captions, of three classes with dots in the names."""
    for split, count in (("train", 12), ("val", 4)):
        for number in range(count):
            path = tmp_path / split / f"00{number % 3}.class" / f"{number}.{SUFFIXES[number % 4]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 16), (number, 0, 0)).save(path, "JPEG")
            path.with_suffix(".txt").write_text(f"picture {number}")
        files = find_images(tmp_path / split, where="x")
        pack_folder(files, tmp_path / "out", prefix=split, samples_per_shard=5, bytes_per_shard=1 << 30, seed=0)
    return tmp_path / "out"


@pytest.mark.parametrize(("split", "count"), [("train", 12), ("val", 4), ("validation", 4)])
def test_timm_reads_all_images_of_a_split(folder: Path, split: str, count: int) -> None:
    data = timm.data.create_dataset("wds/", root=str(folder), split=split)
    samples = list(data)
    assert len(data) == len(samples) == count
    assert sorted(label for _, label in samples) == sorted(number % 3 for number in range(count))
    assert all(image.size == (20, 16) for image, _ in samples)
    training = timm.data.create_dataset("wds/", root=str(folder), split=split, is_training=True, batch_size=4)
    assert len(training) == count


def test_open_clips_trainer_knows_how_many_there_are_and_reads_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pandas = types.ModuleType("pandas")  # for its tables of files, which are not read here
    pandas.__spec__ = importlib.machinery.ModuleSpec("pandas", None)
    if "pandas" not in sys.modules:
        monkeypatch.setitem(sys.modules, "pandas", pandas)
    import open_clip_train.data as open_clip

    # As the versions of webdataset do that open_clip asks for: those since 0.3 mark the end of each shard.
    monkeypatch.setattr(open_clip, "tar_file_expander", partial(tar_file_expander, eof_value=None))
    settings: dict[str, Any] = {"train_num_samples": None, "dataset_resampled": False, "seed": 0, "workers": 0}
    settings |= {"train_data_upsampling_factors": None, "batch_size": 4, "world_size": 1}
    args = argparse.Namespace(train_data=str(folder / "train-{000000..000002}.tar"), **settings)
    data = open_clip.get_wds_dataset(args, lambda image: np.asarray(image).mean(), True, tokenizer=lambda text: [text])
    texts = [text for _, batch in data.dataloader for text in batch]
    assert data.dataloader.num_samples == 12
    assert sorted(texts) == sorted(f"picture {number}" for number in range(12))


def test_hugging_face_reads_the_folder_and_its_shards(folder: Path, tmp_path: Path) -> None:
    lines = f"""
import datasets
folder = datasets.load_dataset({str(folder)!r})
assert {{name: part.num_rows for name, part in folder.items()}} == {{"train": 12, "validation": 4}}, folder
for data in (folder["train"], datasets.load_dataset("webdataset", data_files="{folder}/train-*.tar")["train"]):
    assert sorted(data["cls"]) == [0] * 4 + [1] * 4 + [2] * 4
    assert all(image.size == (20, 16) for image in data["jpg"])
"""
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    subprocess.run([sys.executable, "-c", lines], check=True, env=environment)


def said(folder: Path) -> tuple[dict[str, Any], dict[str, int], dict[str, Any]]:
    card = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])["configs"][0]
    timm, sizes = (json.loads((folder / name).read_text()) for name in ("_info.json", "sizes.json"))
    assert sizes.pop("written_by") == timm["written_by"]
    return timm["splits"], sizes, {part["split"]: part["path"] for part in card["data_files"]}


def write(folder: Path, prefix: str, count: int = 1) -> None:
    with ShardWriter(folder, prefix, samples_per_shard=1) as writer:
        for number in range(count):
            writer.write(f"{prefix}{number}", {"jpg": b"x"})


def test_a_set_of_no_such_name_is_train_and_its_own_and_sets_side_by_side_keep_their_names(tmp_path: Path) -> None:
    write(tmp_path, "shard", 2)
    timm, sizes, card = said(tmp_path)
    assert timm["train"] == timm["shard"] | {"name": "train"} and timm.keys() == {"train", "shard"}
    assert timm["shard"]["num_samples"] == 2 and timm["shard"]["shard_lengths"] == [1, 1]
    assert sizes == {"shard-000000.tar": 1, "shard-000001.tar": 1} and card == {"train": ["shard-[0-9]*.tar"]}
    write(tmp_path, "shard-of more")
    timm, sizes, card = said(tmp_path)
    assert timm.keys() == {"shard", "shard-of more"} and len(sizes) == 3
    assert card == {"shard": ["shard-[0-9]*.tar"], "shard_of_more": ["shard-of more-[0-9]*.tar"]}


def test_what_others_wrote_is_left_as_it_is_and_their_counts_are_kept(tmp_path: Path) -> None:
    others = {"_info.json": '{"splits": {}}', "README.md": "# mine", "sizes.json": '{"theirs.tar": 7, "gone.tar": 1}'}
    for name, text in others.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "theirs.tar").touch()
    write(tmp_path, "train")
    assert {name: (tmp_path / name).read_text() for name in ("_info.json", "README.md")} == {
        name: others[name] for name in ("_info.json", "README.md")
    }
    assert json.loads((tmp_path / "sizes.json").read_text()) == {"theirs.tar": 7, "train-000000.tar": 1}
    for name in ("_info.json", "sizes.json"):
        (tmp_path / name).write_text("[]")
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").symlink_to("/dev/zero")
    write(tmp_path, "val")
    assert [(tmp_path / name).read_text() for name in ("_info.json", "sizes.json")] == ["[]", "[]"]
    assert (tmp_path / "README.md").is_symlink()


def test_index_brings_a_folder_of_an_older_version_up_to_date(folder: Path) -> None:
    before = said(folder)
    for name in ("README.md", "_info.json", "sizes.json"):
        (folder / name).unlink()
    write_folder_indexes(load_index(path) for path in folder.glob("*.tar"))
    assert said(folder) == before
