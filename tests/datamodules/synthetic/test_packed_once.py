"""Shards that are packed into the cache on first use."""

from pathlib import Path

import pytest

from ssmpretrain.datamodules.shards.pack import ShardWriter
from ssmpretrain.datamodules.synthetic.packed_once import pack_once

SHARD = "train-000000.tar"


def pack(folder: Path) -> None:
    with ShardWriter(folder, "train") as writer:
        writer.write("a", {"png": b"x"})


@pytest.mark.parametrize("harmed", [SHARD, "train-000000.index.json", "index.json"])
@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_folder_that_was_damaged_is_packed_anew(tmp_path: Path, harmed: str, harm, caplog) -> None:
    folder = tmp_path / "digits"
    pack_once(folder, pack, "Digits")
    content = (folder / SHARD).read_bytes()
    pack_once(folder, lambda folder: pytest.fail("it is there"), "Digits")
    assert not caplog.records
    harm(folder / harmed)
    pack_once(folder, pack, "Digits")
    assert f"Digits: the shards in {folder} have changed since packing; they are packed again." in caplog.text
    assert (folder / SHARD).read_bytes() == content
    assert list(tmp_path.iterdir()) == [folder]
