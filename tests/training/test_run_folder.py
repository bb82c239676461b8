"""The run folder: what is written, what is moved, what is refused."""

import json
from pathlib import Path

import pytest

from ssmpretrain.training.run_folder import MetricsLogger, RunFolder, read_metrics


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
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_a_step_that_is_logged_twice_is_one_row(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    logger = MetricsLogger(folder)
    for step, value in ((1, 1.5), (1, 1.5), (2, float("nan")), (2, float("nan")), (2, 1.0)):
        logger.log_metrics({"train/loss": value}, step=step)
    assert [row["train/loss"] for row in read_metrics(folder.metrics)] == [1.5, None, 1.0]


def test_the_environment_is_noted_at_each_start(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.prepare()
    folder.prepare(step=1200)
    starts = [line for line in folder.environment.read_text().splitlines() if line.startswith("started ")]
    assert len(starts) == 2 and ", step 0, host " in starts[0] and ", step 1,200, host " in starts[1]
