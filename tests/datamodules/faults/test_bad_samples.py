"""The list of bad samples: shared by worker processes, and independent of the temporary folder."""

import copy
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from ssmpretrain.datamodules.faults.bad_samples import BadRecord, BadSamples
from ssmpretrain.datamodules.faults.shared_lines import SharedLines
from ssmpretrain.datamodules.synthetic.packed_once import pack_once


def record(number: int) -> BadRecord:
    return BadRecord(0, "undecodable images", "a.tar", number, f"{number}", "é" * 500)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


def test_no_file_has_a_name_that_could_be_cleaned_away(temporary: Path) -> None:
    bad = BadSamples("here", 1.0)
    bad.add(record(1), 1000)
    assert not list(temporary.iterdir())
    shutil.rmtree(temporary)
    bad.add(record(2), 1000)
    assert [one.sample for one in bad.records()] == [1, 2]
    assert [one.sample for one in BadSamples("there", 1.0).records()] == []


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_forked_processes_share_it() -> None:
    bad = BadSamples("here", 1.0)
    bad.add(record(7), 1000)
    pids = []
    for number in range(3):
        if (pid := os.fork()) == 0:
            for sample in range(50):
                bad.note(record(100 * number + sample))
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    assert len(bad.records()) == 150 and {one.detail for one in bad.records()} == {"é" * 200}


def test_a_copy_has_a_list_of_its_own() -> None:
    bad = BadSamples("here", 1.0)
    other = copy.deepcopy(bad)
    bad.note(record(1))
    assert len(bad.records()) == 1 and not other.records()


def test_without_room_the_run_goes_on(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    bad, real, room = BadSamples("here", 1.0), os.write, [30]

    def write(descriptor: int, content: bytes) -> int:
        if not room[0]:
            raise OSError(28, "No space left on device")
        written = real(descriptor, content[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(os, "write", write)
    for number in range(3):
        bad.note(record(number))
    monkeypatch.setattr(os, "write", real)
    bad.note(record(3))
    assert [one.sample for one in bad.records()] == [3]
    assert caplog.messages == ["here: the list of bad samples lacks some: No space left on device"]


def test_without_memory_files_it_is_a_file_without_a_name(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    lines = SharedLines()
    lines.append("one")
    assert lines.new() == ["one"] and lines.new() == [] and not list(temporary.iterdir())


def test_what_killed_processes_left_in_the_cache_is_removed(tmp_path: Path) -> None:
    for name, age in ((".digits-old", 2 * 86400), (".digits-new", 60), (".shapes-old", 2 * 86400)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (os.stat(tmp_path).st_mtime - age,) * 2)
    pack_once(tmp_path / "digits", lambda folder: None, "here")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".digits-new", ".shapes-old", "digits"]
