"""Counts of bad samples: each sample counts once, and names are safe for a terminal."""

import io
import logging
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from damaged import SMALL, announce, causes, encoded, evaluated, forget_indexes, member, shards

from ssmpretrain.datamodules import ImageFolder


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_stands_in_for_another_is_counted_once_and_evaluation_apart(make_shards, num_workers: int) -> None:
    bad = {number: {"png": b"no"} for number in range(8, 13)}
    data = shards(make_shards([40], bad=bad), val=None, num_workers=num_workers, shuffle_buffer=1)
    loader = data.train_dataloader()
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        assert sum(len(batch["key"]) for batch in loader) == 40
    assert causes(data, "train") == {"undecodable images": 10}
    list(data.bank_dataloader())
    assert causes(data, "train") == {"undecodable images": 10}
    records = [record for record in data.bad_records() if record["split"] == "train"]
    assert Counter(record["epoch"] for record in records) == {0: 5, 1: 5}
    assert {record["key"] for record in records} == {f"{number:04d}" for number in bad}


def test_a_folder_counts_each_of_its_files(tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(b"no" if number in (2, 3) else encoded("PNG"))
    (tmp_path / "6.jpg").write_bytes(announce(60_000, 60_000, "JPEG"))
    data = ImageFolder(str(tmp_path), **SMALL)
    data.setup("fit")
    assert sum(len(batch["key"]) for batch in data.bank_dataloader()) == 4
    assert causes(data) == {"undecodable images": 2, "giant images": 1}


def test_the_log_names_a_key_that_cannot_be_printed(make_shards, caplog: pytest.LogCaptureFixture) -> None:
    path = make_shards([3]) / "train-000000.tar"
    with tarfile.open(path, "a") as tar:
        tar.addfile(member("a\n\x1b[2Jb\udcff.png", size=2), io.BytesIO(b"no"))
    forget_indexes(path.parent)
    with caplog.at_level(logging.WARNING):
        evaluated(shards(path.parent))
    assert r"skipped a\n\x1b[2Jb\xff in" in caplog.text
