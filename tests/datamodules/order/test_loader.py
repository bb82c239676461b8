"""Workers of a loader when the whole job gets a signal, and when a worker is killed."""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from ssmpretrain.datamodules import ImageShards
from ssmpretrain.datamodules.order.loader import begin_worker
from ssmpretrain.run import messages


class Numbers:
    """A batch takes a moment, so that workers have work when they are signalled."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, number: int) -> int:
        time.sleep(0.05)
        return number


def loader(**options: Any) -> DataLoader[int]:
    return DataLoader(Numbers(), batch_size=None, num_workers=2, worker_init_fn=begin_worker, **options)


def workers() -> list[int]:
    return [child.pid for child in multiprocessing.active_children() if child.pid is not None]


def signal_from_elsewhere(pids: list[int], *signals: signal.Signals) -> None:
    for signum in signals:
        subprocess.run(["kill", f"-{signum.value}", *map(str, pids)], check=True)


def gone(pid: int, within: float = 10) -> bool:
    """Return whether a process has ended, possibly with only its exit code left."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


class Pictures(Numbers):
    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.full((3, 8, 8), number)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere sockets have files")
def test_tensors_come_without_a_file_that_could_be_cleaned_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", None)  # type: ignore[attr-defined]
    numbers = []
    for picture in DataLoader(Pictures(), batch_size=None, num_workers=1, worker_init_fn=begin_worker):
        numbers.append(int(picture[0, 0, 0]))
        assert not list(tmp_path.iterdir())
    assert numbers == list(range(6))


def test_signals_to_the_whole_job_leave_workers_at_work() -> None:
    batches = iter(loader())
    numbers = [int(next(batches)) for _ in range(2)]  # one of each worker: both handle signals by now
    signal_from_elsewhere(workers(), signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    numbers += [int(number) for number in batches]
    assert numbers == list(range(6))


def test_the_main_process_can_end_a_worker() -> None:
    batches = iter(loader(persistent_workers=True))
    next(batches)
    children = multiprocessing.active_children()
    for child in children:
        child.terminate()
    assert all(gone(child.pid) for child in children)


def test_workers_end_when_the_main_process_is_killed() -> None:
    code = (
        "import multiprocessing, time; from test_loader import loader; batches = iter(loader()); next(batches);"
        "print(*[child.pid for child in multiprocessing.active_children()], flush=True); time.sleep(60)"
    )
    path = os.pathsep.join([str(Path(__file__).parent), os.getcwd()])
    environment = {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as main:
        assert main.stdout is not None
        pids = [int(word) for word in main.stdout.readline().split()]
        main.kill()
    assert len(pids) == 2
    assert all(gone(pid, within=20) for pid in pids)


def test_our_loaders_have_such_workers(tmp_path: Path, write_shard: Callable[..., Path]) -> None:
    shard = write_shard(tmp_path / "a.tar", count=16)
    data = ImageShards(train=str(shard), image_size=32, batch_size=2, num_workers=1)
    data.setup()
    batches = iter(data.train_dataloader())
    next(batches)
    signal_from_elsewhere(workers(), signal.SIGTERM)
    assert len(list(batches)) == 7


def test_a_worker_that_the_system_killed_is_explained() -> None:
    batches = iter(loader())
    next(batches)
    signal_from_elsewhere(workers()[:1], signal.SIGKILL)
    with pytest.raises(RuntimeError) as raised:
        list(batches)
    code, message = messages.explain(raised.value) or (0, "")
    assert code == 2
    assert "most likely because the machine had no memory left" in message
