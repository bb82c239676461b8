"""A run that gets a stop signal while it waits for a batch saves between two steps, and leaves soon."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import steady_run
import torch
from lightning.pytorch import Callback
from stalled_run import Stalled, stalling
from steady_run import BATCHES, Model, fit

from ssmpretrain.training.stopping import data_wait


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_wait, "_PATIENCE", 0.3)
    monkeypatch.setattr(data_wait, "_EVERY", 0.05)


def stalled_fit(monkeypatch: pytest.MonkeyPatch, folder: Path, *callbacks: Callback, **places: Any) -> Model:
    options = {name: places.pop(name) for name in list(places) if not hasattr(Stalled, name)}
    with monkeypatch.context() as patch:
        patch.setattr(steady_run, "Data", stalling(**places))
        begun = time.monotonic()
        stopped = fit(folder, *callbacks, **options)
        assert time.monotonic() - begun < 15
    return stopped


@pytest.mark.parametrize(
    ("place", "step"),
    [
        ({"training": 3}, 3),
        ({"training": 3, "signum": signal.SIGINT}, 3),
        ({"training": 3, "signum": signal.SIGUSR1}, 3),
        ({"validation": 1, "val_check_interval": 0.5}, 3),
    ],
)
def test_a_run_without_data_is_saved_and_goes_on_as_if_nothing_had_been(
    place: dict[str, Any], step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    options = {name: value for name, value in place.items() if name == "val_check_interval"}
    whole = fit(tmp_path / "whole", **options)
    stopped = stalled_fit(monkeypatch, tmp_path / "run", **place)
    assert stopped.code == 75
    saved = tmp_path / "run" / "checkpoints" / f"step-00000000{step}.ckpt"
    assert f"at step {step} (epoch 0), saved {saved}" in capfd.readouterr().err
    rest = fit(tmp_path / "run", **options)
    assert stopped.losses | rest.losses == whole.losses
    assert len(stopped.losses) + len(rest.losses) == len(whole.losses)
    assert torch.equal(rest.weight, whole.weight)


def test_accumulated_batches_of_a_step_that_waits_are_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = stalled_fit(monkeypatch, tmp_path, training=5, accumulate_grad_batches=2)
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    counts = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
    assert (stopped.code, checkpoint["global_step"], counts["processed"], counts["ready"]) == (75, 2, 4, 4)


def test_before_the_first_step_there_is_nothing_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = stalled_fit(monkeypatch, tmp_path, training=0)
    assert stopped.code == 75 and not stopped.losses
    assert fit(tmp_path).code == 0


def test_a_batch_that_comes_late_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(Stalled):
        def stall(self, batches: Any, after: int) -> Iterator[Any]:
            for number, batch in enumerate(batches):
                if number == 3:
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(0.1)
                yield batch

    monkeypatch.setattr(steady_run, "Data", Late)
    stopped = fit(tmp_path)
    assert (stopped.code, len(stopped.losses)) == (75, 4)
    assert BATCHES > 4


def test_a_main_thread_that_no_signal_wakes_is_saved_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    saved, ended = [], threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda signum, frame: None)
    monkeypatch.setattr(data_wait, "_TO_WAKE", 0.2)
    monkeypatch.setattr(signal, "pthread_kill", lambda thread, signum: None)
    wait = data_wait.DataWait(lambda: saved.append(1), lambda signum: None, lambda signum: ended.set())
    wait.listen({signal.SIGTERM})

    def batches() -> Iterator[int]:
        yield 1
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended.wait(5)
        yield 2

    assert list(wait.each(batches())) == [1, 2]
    wait.over()
    signal.signal(signal.SIGTERM, previous)
    assert saved == [1]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_leave_together_when_one_of_them_waits_for_data(rank: int, tmp_path: Path) -> None:
    support = Path(__file__).parents[2] / "support"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", str(support / "stalled_run.py"), str(tmp_path), str(rank)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [json.loads((tmp_path / f"stopped-{number}.json").read_text()) for number in range(2)] == [75, 75]
    assert f"stopped by SIGTERM at step {BATCHES + 2} (epoch 1)" in done.stderr
    assert fit(tmp_path).losses.keys() == set(range(BATCHES + 2, 3 * BATCHES))
