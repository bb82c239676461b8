"""Index of a folder: the work that it saves, and the cases in which it is ignored."""

import json
import os
from pathlib import Path

import pytest

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules.shards import describe
from ssmpretrain.datamodules.shards.describe import load_index, load_indexes
from ssmpretrain.datamodules.shards.folder_index import NAME, describe_folder, parse_counts, write_folder_indexes
from ssmpretrain.datamodules.shards.pack import ShardWriter
from ssmpretrain.datamodules.tar.index import ShardIndex, write_index


@pytest.fixture
def folder(make_shards) -> Path:
    folder = make_shards([3, 4, 5])
    write_folder_indexes(map(load_index, shards(folder)))
    return folder


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar"))


def samples(folder: Path) -> list[int]:
    return [index.samples for index in load_indexes(shards(folder))]


def test_a_folder_index_says_what_those_of_its_shards_say_and_they_are_not_read(folder: Path, monkeypatch) -> None:
    each = [load_index(shard) for shard in shards(folder)]
    monkeypatch.setattr(describe, "load_index", lambda shard: pytest.fail("read one by one"))
    assert load_indexes(shards(folder)) == each


def test_a_rewritten_shard_is_described_anew_whether_its_size_changed_or_not(folder: Path) -> None:
    first, second, _ = shards(folder)
    content = json.loads((folder / NAME).read_text())
    content["shards"][second.name]["samples"] = 6  # as if it had been of an older file of the same size
    (folder / NAME).write_text(json.dumps(content))
    assert samples(folder) == [3, 6, 5]
    later = (folder / NAME).stat().st_mtime + 1
    os.utime(second, (later, later))
    assert samples(folder) == [3, 4, 5]
    first.write_bytes(first.read_bytes() + bytes(512))
    earlier = later - 10
    os.utime(first, (earlier, earlier))
    write_index(first)
    assert load_indexes(shards(folder))[0].bytes == first.stat().st_size


def test_writing_for_some_shards_keeps_what_is_said_of_the_others_that_are_there(folder: Path) -> None:
    first, second, third = shards(folder)
    second.unlink()
    write_folder_indexes([load_index(third)])
    assert set(describe_folder(folder)) == {first.name, third.name}


def test_packing_twice_into_a_folder_describes_both(tmp_path: Path) -> None:
    for prefix in ("train", "val"):
        with ShardWriter(tmp_path, prefix) as writer:
            writer.write("a", {"png": b"x"})
    assert set(describe_folder(tmp_path)) == {"train-000000.tar", "val-000000.tar"}


@pytest.mark.parametrize("text", ["<html>", "[]", '{"version": 2, "shards": []}', '{"format": "ssmpretrain shards"}'])
def test_an_index_json_of_something_else_is_passed_over_and_not_overwritten(folder: Path, text: str) -> None:
    (folder / NAME).write_text(text)
    assert samples(folder) == [3, 4, 5]
    with pytest.raises(DataError, match="is not an index of shards, and is not overwritten"):
        write_folder_indexes(map(load_index, shards(folder)))
    assert (folder / NAME).read_text() == text


def test_numbers_of_samples_serve_where_a_shard_has_no_index_and_did_not_change(folder: Path) -> None:
    (folder / NAME).unlink()
    first, second, _ = shards(folder)
    (folder / "sizes.json").write_text(json.dumps({shard.name: 7 for shard in shards(folder)}))
    for shard in (first, second):
        shard.with_name(shard.name.replace(".tar", ".index.json")).unlink()
    later = (folder / "sizes.json").stat().st_mtime + 1
    os.utime(second, (later, later))
    found = load_indexes(shards(folder))
    assert [index.samples for index in found] == [7, 4, 5]
    status = first.stat()
    assert found[0] == ShardIndex(first, 7, status.st_size, {}, indexed=True, mtime_ns=status.st_mtime_ns)


@pytest.mark.parametrize(
    "text", ["<html>", "[1]", '{"splits": 3}', '{"splits": {"a": {"filenames": ["a.tar"]}}}', '{"a.tar": "5"}']
)
def test_numbers_in_another_form_are_none(text: str) -> None:
    assert parse_counts(text.encode()) == {}
