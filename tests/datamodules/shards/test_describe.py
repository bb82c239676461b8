import json
import tarfile
from pathlib import Path

import pytest

from ssmpretrain.datamodules.shards.describe import load_index, load_indexes
from ssmpretrain.datamodules.shards.shard import Shard
from ssmpretrain.datamodules.tar.index import checksum, index_path, locate_samples, walk, write_index


@pytest.fixture
def shard(make_shards) -> Path:
    return make_shards([9]) / "train-000000.tar"


def test_index_file_and_walk_agree(shard: Path) -> None:
    index, offsets = load_index(shard), locate_samples(shard).offsets
    assert (index.samples, index.bytes, index.images) == (9, shard.stat().st_size, 9)
    assert index.extensions == {"png": 9, "cls": 9}
    assert index.sha256 == checksum(shard)
    walked, walked_offsets = walk(shard)
    assert (walked.samples, walked.extensions) == (index.samples, index.extensions)
    assert walked_offsets.tolist() == offsets.tolist()


def test_any_sample_can_be_read_alone(shard: Path) -> None:
    for number in range(9):
        assert Shard(load_index(shard)).read_sample(number)["__key__"] == f"{number:04d}"


def test_long_names_and_folders_do_not_confuse_offsets(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(tmp_path, "folder", recursive=False)
        for number in range(4):
            for extension in ("jpg", "txt"):
                member = tarfile.TarInfo(f"folder/{'long' * 40}{number}.{extension}")
                tar.addfile(member)
    index, _ = walk(path)
    assert (index.samples, index.extensions) == (4, {"jpg": 4, "txt": 4})
    last = Shard(index).read_sample(3)
    assert last["__key__"].endswith("3")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html><title>403 Forbidden</title>" + b" " * 600, "web page .'403 Forbidden'"),
        (b"\x1f\x8b" + bytes(600), "compressed with gzip"),
        (b"no tar at all" * 100, "not a tar file"),
        (b"x", "not a tar file"),
    ],
)
def test_a_file_that_is_no_tar_is_named_for_what_it_is(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"a.tar: .*{message}"):
        load_index(path)


@pytest.mark.parametrize("keep", [0.3, 0.55, 0.8])
def test_a_truncated_shard_is_found_with_and_without_index(shard: Path, keep: float) -> None:
    content = shard.read_bytes()
    shard.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ValueError, match=r"its index .* describes"):
        load_index(shard)
    index_path(shard).unlink()
    with pytest.raises(ValueError, match="truncated after sample"):
        load_index(shard)


def test_a_cut_between_two_members_is_found(shard: Path) -> None:
    offsets = locate_samples(shard).offsets
    shard.write_bytes(shard.read_bytes()[: offsets[5]])
    index_path(shard).unlink()
    with pytest.raises(ValueError, match=r"(truncated|damaged) after sample 5"):
        load_index(shard)


def test_a_damaged_header_in_mid_file_is_found(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    offset = int(locate_samples(shard).offsets[5])
    content[offset : offset + 512] = b"\xff" * 512
    shard.write_bytes(content)
    index_path(shard).unlink()
    with pytest.raises(ValueError, match=r"(truncated|damaged) after sample 5"):
        load_index(shard)


def test_an_index_that_is_no_index_is_refused(shard: Path) -> None:
    for content in ("", "{}", "[]", json.dumps({"version": 99})):
        index_path(shard).write_text(content)
        with pytest.raises(ValueError, match="is not an index of version 1"):
            load_index(shard)


def test_the_indexes_of_shards_are_loaded_in_order_with_the_errors_of_damaged_ones(make_shards) -> None:
    folder = make_shards([3, 4, 5])
    (folder / "train-000001.tar").write_bytes(b"<html>")
    first, error, last = load_indexes(sorted(folder.glob("*.tar")))
    assert (first.samples, last.samples) == (3, 5)
    assert "train-000001.tar: its index" in str(error)


def test_a_rewritten_shard_is_read_anew(shard: Path, make_shards) -> None:
    assert load_index(shard).samples == 9
    other = make_shards([5], prefix="other") / "other-000000.tar"
    other.replace(shard)
    assert write_index(shard).samples == load_index(shard).samples == 5
    assert len(locate_samples(shard).offsets) == 5
