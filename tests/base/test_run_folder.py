"""Run folder: files that are written, moved aside or refused."""

import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ssmpretrain.base.json_lines import read_rows
from ssmpretrain.base.run_folder import RunFolder
from ssmpretrain.base.whole_files import replace_text
from ssmpretrain.run.metrics_logger import MetricsLogger


def test_prepare_makes_the_folders_and_notes_the_environment(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a" / "b")
    folder.prepare()
    assert folder.checkpoints.is_dir() and folder.plots.is_dir()
    assert not list(folder.checkpoints.iterdir())
    assert "torch " in (folder.path / "environment.txt").read_text()


def test_an_earlier_run_is_moved_never_deleted(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert folder.move_aside() is None
    for number in (1, 2):
        folder.prepare()
        (folder.path / "mark").write_text(str(number))
        assert folder.move_aside() == tmp_path / f"run.{number}"
    assert (tmp_path / "run.1" / "mark").read_text() == "1" and (tmp_path / "run.2" / "mark").read_text() == "2"


def test_a_file_in_the_way_is_an_os_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(OSError) as caught:
        RunFolder(tmp_path / "run").prepare()
    assert str(tmp_path / "run") in str(caught.value.filename)


def test_metrics_are_json_lines_and_not_a_number_is_null(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    logger = MetricsLogger(folder)
    logger.log_metrics({"train/loss": 1.5}, step=1)
    logger.log_metrics({"train/loss": float("nan")}, step=2)
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert [(row["step"], row["train/loss"]) for row in rows] == [(1, 1.5), (2, None)]


def test_a_half_written_last_line_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "tra')
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_a_step_that_is_logged_twice_is_one_row(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    logger = MetricsLogger(folder)
    for step, value in ((1, 1.5), (1, 1.5), (2, float("nan")), (2, float("nan")), (2, 1.0)):
        logger.log_metrics({"train/loss": value}, step=step)
    assert [row["train/loss"] for row in read_rows(folder.metrics)] == [1.5, None, 1.0]


def test_the_environment_is_noted_at_each_start(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.prepare()
    folder.prepare(step=1200)
    starts = [line for line in folder.environment.read_text().splitlines() if line.startswith("started ")]
    assert len(starts) == 2 and ", step 0, host " in starts[0] and ", step 1,200, host " in starts[1]


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """Limit all files of this process to `size` bytes, as on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_on_a_full_disk_rows_wait_and_none_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunFolder(tmp_path)
    logger = MetricsLogger(folder)
    logger.log_metrics({"a": 0.0}, step=0)
    with files_end_at(folder.metrics.stat().st_size + 10):
        for step in (1, 2):
            logger.log_metrics({"a": float(step)}, step=step)
            assert len(folder.metrics.read_text().splitlines()) == 1
    logger.log_metrics({"a": 3.0}, step=3)
    assert [row["step"] for row in read_rows(folder.metrics)] == [0, 1, 2, 3]
    assert len(caplog.messages) == 1 and "metrics.jsonl: not written: File too large" in caplog.text


def test_a_text_that_cannot_be_replaced_stays_and_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    replace_text(path, "old")
    with files_end_at(10), pytest.raises(OSError) as caught:
        replace_text(path, "new" * 10)
    assert caught.value.filename == str(path) and path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
