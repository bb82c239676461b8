"""One job at a time in a run folder."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ssmpretrain
from ssmpretrain.run.start.lock import RunLock


@pytest.fixture
def killed_with_a_worker(tmp_path: Path) -> Iterator[int]:
    """Process number of a worker whose parent held the lock of `tmp_path` and was killed."""
    script = """
        import os, sys, time
        from pathlib import Path
        from ssmpretrain.run.start.lock import RunLock
        lock = RunLock(Path(sys.argv[1]))
        if os.fork() == 0:
            print(os.getpid(), flush=True)
        time.sleep(60)
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(ssmpretrain.__file__).parents[1])}
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    with pytest.raises(ValueError, match="another job"):
        RunLock(tmp_path)
    process.kill()
    process.wait()
    process.stdout.close()
    yield worker
    os.kill(worker, signal.SIGKILL)


def test_a_killed_run_leaves_no_lock_though_its_workers_live(killed_with_a_worker: int, tmp_path: Path) -> None:
    os.kill(killed_with_a_worker, 0)
    RunLock(tmp_path).release()


def test_where_there_are_no_locks_there_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    RunLock(tmp_path).release()
    RunLock(tmp_path / "gone").release()
    assert [text.split(": ")[1].split(" (")[0] for text in caplog.messages] == [
        "the file system has no locks", "not locked"
    ]  # fmt: skip


def test_a_lock_is_taken_once_and_let_go_at_the_end_of_its_block(tmp_path: Path) -> None:
    with RunLock(tmp_path, at_once=False) as lock:
        RunLock(tmp_path).release()  # nobody holds it yet
        lock.take()
        lock.take()
        with pytest.raises(ValueError, match="another job"):
            RunLock(tmp_path)
    RunLock(tmp_path).release()
