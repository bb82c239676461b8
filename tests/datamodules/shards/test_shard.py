"""Shards that change, disappear or become unreadable during a run."""

import errno
import os
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from damaged import SMALL, causes, evaluated, failing, forget_indexes, shards

from ssmpretrain.datamodules import ImageShards
from ssmpretrain.datamodules.files import patience
from ssmpretrain.datamodules.shards import open_tar
from ssmpretrain.datamodules.shards import shard as one_shard
from ssmpretrain.datamodules.shards.describe import load_index
from ssmpretrain.datamodules.shards.shard import Shard
from ssmpretrain.datamodules.tar import index, walk
from ssmpretrain.datamodules.tar.walk import Walked


def test_a_shard_is_handed_to_another_process_and_read_there(make_shards) -> None:
    path = make_shards([9]) / "train-000000.tar"
    shard = pickle.loads(pickle.dumps(Shard(load_index(path))))
    assert [shard.read_sample(number)["__key__"] for number in (8, 0)] == ["0008", "0000"]
    assert shard.read_sample(3)["__url__"] == str(shard) == str(path)


def test_the_samples_of_a_shard_are_located_once(make_shards, monkeypatch: pytest.MonkeyPatch) -> None:
    located: list[Path] = []
    locate = open_tar.locate_samples
    monkeypatch.setattr(open_tar, "locate_samples", lambda path, size: located.append(path) or locate(path, size))
    data = shards(make_shards([9, 4]))
    assert evaluated(data) == evaluated(data) == list(range(13))
    assert len(located) == 2


@pytest.mark.parametrize("indexed", [True, False])
def test_a_shard_that_is_removed_costs_its_samples_once(make_shards, indexed: bool) -> None:
    folder = make_shards([11, 4, 20, 7])
    if not indexed:
        forget_indexes(folder)
    data = shards(folder, num_workers=2)
    data.setup("fit")
    (folder / "train-000001.tar").unlink()
    assert evaluated(data) == [number for number in range(42) if not 11 <= number < 15]
    batches = list(data.train_dataloader())
    assert [len(batch["key"]) for batch in batches] == [4] * 10
    read = Counter(record["sample"] for record in data.bad_records() if record["split"] == "train")
    assert set(read.values()) == {1}
    assert set(causes(data, "train")) == {"missing shards"}


def test_one_lost_shard_of_many_does_not_stop_a_run_and_one_of_four_does(make_shards) -> None:
    folder = make_shards([16] * 80)
    data = shards(folder, max_bad_fraction=0.015)
    data.setup("fit")
    (folder / "train-000066.tar").unlink()
    assert len(evaluated(data)) == 79 * 16
    folder = make_shards([16] * 4, prefix="few")
    data = ImageShards(f"{folder}/few-*.tar", **SMALL)
    data.setup("fit")
    (folder / "few-000002.tar").unlink()
    with pytest.raises(ValueError, match=r"more than 1.00% .*: 11 samples of missing shards in 1 file, .*few-000002"):
        evaluated(data)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_shard_that_is_replaced_is_not_read_where_other_samples_lie(make_shards, indexed: bool) -> None:
    folder = make_shards([11, 8])
    other = make_shards([9], prefix="other") / "other-000000.tar"
    if not indexed:
        forget_indexes(folder)
    data = shards(folder)
    data.setup("fit")
    (folder / "train-000001.tar").write_bytes(other.read_bytes())
    assert evaluated(data) == list(range(11))
    assert causes(data) == {"changed shards": 8}


def test_a_shard_that_is_written_again_with_the_same_contents_is_the_same(make_shards) -> None:
    folder = make_shards([11, 8])
    data = shards(folder)
    data.setup("fit")
    path = folder / "train-000001.tar"
    os.utime(path, ns=(1, 1))
    assert len(evaluated(data)) == 19
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(2, 2))
    assert evaluated(data) == list(range(11))
    assert causes(data) == {"changed shards": 8}


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_an_error_that_may_pass_is_retried_with_a_file_opened_anew(
    make_shards, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    data = shards(make_shards([9]))
    files, waits, closed = [], [], []
    monkeypatch.setattr(one_shard, "close_local", lambda: closed.append(len(files)))
    read = os.pread

    def fail_twice(file: int, count: int, start: int) -> bytes:
        files.append(file)
        if len(files) in (3, 4):
            raise OSError(number, os.strerror(number))
        return read(file, count, start)

    monkeypatch.setattr(os, "pread", fail_twice)
    monkeypatch.setattr(patience.time, "sleep", waits.append)
    assert evaluated(data) == list(range(9))
    # The last read is of the list of labels that could not be read.
    assert (len(files), len(waits), closed) == (12, 2, [3, 4])
    assert waits == sorted(waits)
    assert causes(data) == {}


def test_an_error_that_does_not_pass_is_counted(make_shards, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_shards([11, 4])
    data = shards(folder)
    data.setup("fit")

    def fail(file: int, count: int, start: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{file}").endswith("000001.tar"):
            raise OSError(errno.EIO, "Input/output error")
        return read(file, count, start)

    read = os.pread
    monkeypatch.setattr(os, "pread", fail)
    monkeypatch.setattr(patience.time, "sleep", lambda seconds: None)
    assert evaluated(data) == list(range(11))
    assert causes(data) == {"unreadable shards": 4}


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: (path.unlink(), path.mkdir())])
def test_a_shard_that_goes_with_its_folder_is_counted(make_shards, harm: Callable[[Path], object]) -> None:
    folder = make_shards([11, 4])
    data = shards(folder, max_bad_fraction=1.0)
    data.setup("fit")
    forget_indexes(folder)
    harm(folder / "train-000001.tar")
    open_tar.close_local()
    assert evaluated(data) == list(range(11))
    (cause,) = causes(data)
    assert cause in ("missing shards", "unreadable shards")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_headers_that_cannot_be_read_for_a_moment_are_read_again(
    make_shards, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    folder = make_shards([5, 4])
    forget_indexes(folder)
    waits = failing(monkeypatch, "train-000001.tar", number, 3)
    data = shards(folder)
    data.setup("fit")
    assert (evaluated(data), causes(data), len(waits)) == (list(range(9)), {}, 3)
    assert 0.1 < waits[0] < waits[2]


def test_headers_that_can_no_longer_be_read_are_counted_and_waited_for_once(
    make_shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_shards([5, 4])
    forget_indexes(folder)
    data = shards(folder)
    data.setup("fit")
    monkeypatch.setattr(index, "walk_tar", walk_again)
    waits = failing(monkeypatch, "train-000001.tar", errno.EIO, 10**6)
    assert evaluated(data) == list(range(5))
    assert causes(data) == {"unreadable shards": 4}
    assert len(waits) == patience.PATIENT.attempts - 1


def walk_again(shard: Path) -> Walked:
    """Clear the results of walks over headers, as in a new process."""
    return walk._walk.__wrapped__(shard, shard.stat().st_size, 0)


def test_a_shard_that_cannot_be_read_at_the_start_is_an_error_that_names_it(
    make_shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_shards([5, 4])
    forget_indexes(folder)
    failing(monkeypatch, "train-000001.tar", errno.EIO, 10**6)
    with pytest.raises(ValueError, match=r"train-000001.tar: Input/output error \(4 attempts\)"):
        shards(folder).setup("fit")
