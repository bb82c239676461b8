"""Files are complete or absent, and nothing is written through a link."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ssmpretrain.base.errors import PathMissing
from ssmpretrain.base.json_lines import RowFile, mend_rows, read_rows, series
from ssmpretrain.base.whole_files import append, moved_into_place, naming, opened, replace_text


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_text("precious")
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run" / "metrics.jsonl"


@pytest.mark.parametrize("write", [lambda path: replace_text(path, "{}\n"), lambda path: append(path, b"{}\n")])
def test_a_link_is_not_followed(path: Path, victim: Path, write: Callable[[Path], None]) -> None:
    path.symlink_to(victim)
    write(path)
    assert victim.read_text() == "precious" and path.read_text() == "{}\n" and not path.is_symlink()


def test_a_file_is_on_the_disk_before_it_gets_its_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[int, bool]] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append((os.fstat(descriptor).st_ino, path.exists())))
    replace_text(path, "new")
    assert (path.stat().st_ino, False) in synced


def test_a_name_for_half_a_file_cannot_be_taken_before(path: Path, victim: Path) -> None:
    path.with_name(f".{path.name}.partial").symlink_to(victim)
    replace_text(path, "new")
    assert victim.read_text() == "precious" and path.read_text() == "new"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to(path)])
def test_what_is_no_file_is_moved_aside_and_said(
    path: Path, make: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    make(path)
    with pytest.raises(OSError), opened(path):  # at once
        pass
    append(path, b"{}\n")
    assert path.read_text() == "{}\n" and os.path.lexists(f"{path}.damaged")
    assert [f"{path}: a regular file belongs here; what stood there is now metrics.jsonl.damaged"] == caplog.messages


def test_a_folder_in_the_place_of_a_file_is_moved_aside(path: Path) -> None:
    path.mkdir()
    (path / "notes").touch()
    replace_text(path, "text")
    assert path.read_text() == "text" and Path(f"{path}.damaged", "notes").exists()


@pytest.mark.parametrize("room", [0, 1, 9])
def test_a_disk_that_is_full_for_a_moment_gets_whole_lines_or_none(
    path: Path, room: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, left = os.write, [room]

    def short(descriptor: int, content: bytes) -> int:
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = real(descriptor, content[: left[0]])
        left[0] -= written
        return written

    rows = RowFile(path)
    rows.append(['{"step": 0}'])
    monkeypatch.setattr(os, "write", short)
    for step in (1, 2):
        rows.append([f'{{"step": {step}}}'])
        assert path.read_text() == '{"step": 0}\n'
    monkeypatch.setattr(os, "write", lambda descriptor, content: real(descriptor, content[:5]))  # slow, not full
    rows.append(['{"step": 3}'])
    assert [row["step"] for row in read_rows(path)] == [0, 1, 2, 3]
    assert caplog.messages == [f"{path}: not written: No space left on device; its rows wait until they can be"]


def test_a_torn_line_is_ended_before_the_next(path: Path) -> None:
    path.write_text('{"step": 1}\n{"st')
    RowFile(path).append(['{"step": 2}'])
    assert [row["step"] for row in read_rows(path)] == [1, 2]


DAMAGED = [b"{", b"\x00\xff\xfe", b"[1]", b"7", b"", b"null", b'"text"', b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}"]


def test_damaged_lines_are_set_aside_said_and_the_others_stay(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = [b'{"step":  1, "a": 1}\n', b'{"step": 2}\n']
    path.write_bytes(good[0] + b"\n".join(DAMAGED) + b"\n" + good[1] + b'{"step": 3, "a')
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    mend_rows(path)
    assert path.read_bytes() == b"".join(good)
    assert Path(f"{path}.damaged").read_bytes() == b"\n".join(DAMAGED) + b"\n"
    assert caplog.messages == [f"{path}: {len(DAMAGED)} damaged lines set aside in metrics.jsonl.damaged"]
    mend_rows(path)
    assert len(caplog.messages) == 1


def test_values_that_are_no_numbers_are_not_drawn() -> None:
    rows = [{"step": 1, "a": 2.0}, {"a": 1}, {"step": 2, "a": None}, {"step": 3, "a": "x"}, {"step": [4], "a": 1}]
    rows += [{"step": 5, "a": float("nan")}, {"step": 6, "a": 10**400}, {"step": 7, "a": [1]}, {"step": 8, "a": 3}]
    assert series(rows, "a") == [(1, 2.0), (8, 3)]


def test_a_file_or_a_folder_is_moved_into_place_whole_and_removed_after_an_error(tmp_path: Path) -> None:
    with moved_into_place(tmp_path / "a.onnx") as waiting:
        assert waiting.parent == tmp_path and not waiting.exists()
        waiting.write_text("whole")
    with moved_into_place(tmp_path / "folder") as waiting:
        waiting.mkdir()
        (waiting / "b").write_text("whole")
    for make in (Path.touch, Path.mkdir, lambda path: None):
        with pytest.raises(KeyError), moved_into_place(tmp_path / "a.onnx") as waiting:
            make(waiting)
            raise KeyError
    assert (tmp_path / "a.onnx").read_text() == (tmp_path / "folder" / "b").read_text() == "whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "folder"]
    with pytest.raises(OSError), moved_into_place(tmp_path / "folder") as waiting:
        waiting.mkdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "folder"]


def test_an_error_of_ours_keeps_its_message_where_those_of_the_system_get_a_name(path: Path) -> None:
    with pytest.raises(PathMissing, match="data: no file"), naming(path):
        raise PathMissing("data: no file b. Correct the path.")
    with pytest.raises(OSError) as raised, naming(path):
        raise OSError(errno.ENOSPC, "No space left")
    assert raised.value.filename == str(path)
