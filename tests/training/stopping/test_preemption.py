"""Stopping by a signal within this process, at every point where a run can stop."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_slurm import JOB, FakeSlurm
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from steady_run import BATCHES, PLACES, At, Data, Model, fit

from ssmpretrain.training.stopping.preemption import Preemption


@pytest.fixture
def uninterrupted(tmp_path: Path) -> Callable[..., Model]:
    return lambda **options: fit(tmp_path / "uninterrupted", **options)


@pytest.mark.parametrize("validation", [1.0, 0.5])
@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(
    place: str, validation: float, tmp_path: Path, uninterrupted: Callable[..., Model]
) -> None:
    options = {"val_check_interval": validation}
    whole = uninterrupted(**options)
    stopped = fit(tmp_path / "run", At(*PLACES[place]), **options)
    again = fit(tmp_path / "run", At(*PLACES[place]), **options)  # as long a part of what is left
    rest = fit(tmp_path / "run", **options)
    assert (stopped.code, again.code, rest.code) == (75, 75, 0)
    assert stopped.losses | again.losses | rest.losses == whole.losses
    assert len(stopped.losses) + len(again.losses) + len(rest.losses) == len(whole.losses)  # none a second time
    assert stopped.validated | again.validated | rest.validated == whole.validated
    assert torch.equal(rest.weight, whole.weight)
    assert rest.trainer_used.fit_loop.epoch_loop._batches_that_stepped == 3 * BATCHES


def test_a_run_killed_in_a_validation_in_the_middle_of_an_epoch_begins_with_that_validation(
    tmp_path: Path, uninterrupted: Callable[..., Model]
) -> None:
    class Lost(Callback):
        def on_validation_batch_end(self, trainer: Trainer, *given: Any, **named: Any) -> None:
            if trainer.global_step == 9:
                raise ConnectionError("the machine is gone")

    options = {"val_check_interval": 0.5, "saves": 3}
    whole = uninterrupted(**options)
    with pytest.raises(ConnectionError):
        fit(tmp_path / "run", Lost(), **options)
    rest = fit(tmp_path / "run", **options)
    assert sorted(rest.losses) == list(range(9, 18))
    assert rest.losses.items() <= whole.losses.items()
    assert sorted(rest.validated) == [9, 12, 15, 18]
    assert torch.equal(rest.weight, whole.weight)


def test_a_run_stops_after_an_optimizer_step_not_between_accumulated_batches(
    tmp_path: Path, uninterrupted: Callable[..., Model]
) -> None:
    options = {"accumulate_grad_batches": 3, "limit_val_batches": 0}
    whole = uninterrupted(**options)
    stopped = fit(tmp_path / "run", At("on_train_batch_start", 1), **options)
    assert sorted(stopped.losses) == [0, 1, 2]
    rest = fit(tmp_path / "run", **options)
    assert stopped.losses | rest.losses == whole.losses
    assert torch.equal(rest.weight, whole.weight)


@pytest.mark.parametrize("limit", [{"max_epochs": 1}, {"max_steps": 4}])
def test_a_signal_in_the_last_step_finds_the_run_complete(limit: dict[str, int], tmp_path: Path) -> None:
    steps = limit.get("max_steps", BATCHES)
    model = fit(tmp_path, At("on_train_batch_start", steps), limit_val_batches=0, **limit)
    assert (model.code, len(model.losses)) == (0, steps)


def test_an_epoch_of_one_batch_can_be_stopped(tmp_path: Path) -> None:
    model = fit(tmp_path, At("on_train_batch_start", 2), limit_train_batches=1, limit_val_batches=0, max_epochs=5)
    assert (model.code, len(model.losses)) == (75, 2)


def test_a_signal_in_the_sanity_check_ends_the_run_before_its_first_step(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = fit(tmp_path, At("on_validation_start", 1), num_sanity_val_steps=2)
    assert (model.code, model.losses) == (75, {})
    assert "stopped by SIGTERM before the first step" in capfd.readouterr().err
    assert not (tmp_path / "checkpoints").exists()


def test_one_line_says_what_stopped_where_it_stands_and_what_to_do(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, At("on_train_batch_start", BATCHES + 2, signal.SIGUSR1))
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("ssmpretrain: ")]
    assert lines == [
        "ssmpretrain: SIGUSR1: stopping after this step",
        f"ssmpretrain: stopped by SIGUSR1 at step 8 (epoch 1), saved {tmp_path}/checkpoints/step-000000008.ckpt; "
        "start the same command again to continue",
    ]


def test_a_run_stops_when_its_time_is_up_and_the_next_has_as_much(tmp_path: Path) -> None:
    codes = [fit(tmp_path, max_time={"microseconds": 1}, max_steps=3).code for _ in range(3)]
    assert codes == [75, 75, 0]  # a step each


def test_one_ctrl_c_stops_after_the_step_and_a_second_at_once(tmp_path: Path) -> None:
    assert fit(tmp_path / "one", At("on_train_batch_start", 2, signal.SIGINT)).code == 75
    two = fit(tmp_path / "two", At("on_train_batch_start", 2, signal.SIGINT, signal.SIGINT))
    assert (two.code, len(two.losses)) == (1, 1)  # Lightning's way; the command line makes 130 of it
    assert not (tmp_path / "two" / "checkpoints").exists()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_validate_just_ends(signum: signal.Signals, code: int, capfd: pytest.CaptureFixture[str]) -> None:
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    callbacks = [At("on_validation_batch_end", 1, signum), Preemption()]
    trainer, model = Trainer(callbacks=callbacks, **options), Model()
    with pytest.raises(SystemExit) as left:
        trainer.validate(model, Data())
    assert (left.value.code, model.validated) == (code, {0: [0]})
    assert f"ssmpretrain: stopped by {signum.name}\n" in capfd.readouterr().err


def test_a_checkpoint_that_cannot_be_written_is_an_error_and_not_a_stop(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(OSError):
        fit(tmp_path, At("on_train_batch_start", 2))


def test_handlers_are_those_of_before_when_the_run_is_over(tmp_path: Path) -> None:
    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(signum) for signum in signals]
    fit(tmp_path / "complete", max_epochs=1)
    fit(tmp_path / "stopped", At("on_train_batch_start", 2))
    assert [signal.getsignal(signum) for signum in signals] == before


def test_all_ranks_stop_after_the_same_step_when_one_gets_a_signal_wherever_they_are(tmp_path: Path) -> None:
    program = Path(__file__).parents[2] / "support" / "steady_run.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", str(program), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    for place, seen in first.items():
        stopped = seen.pop("stopped at")
        equal = {"losses are equal": True, "validations are equal": True, "weights are equal": True}
        assert seen == {"codes": [75, 0], "batches trained": 3 * BATCHES, **equal}, place
        assert 0 < stopped < 3 * BATCHES, place


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """This process as the one task of a job."""
    fake = FakeSlurm(tmp_path / "slurm")
    script = tmp_path / "job.sbatch"
    script.write_text("#SBATCH --job-name=a\n#SBATCH --nodes=1\n#SBATCH --ntasks-per-node=1\n")
    for name, value in {**fake.environment(script), "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_NODEID", "0")
    return fake


@pytest.mark.parametrize(
    ("signum", "state", "calls", "words"),
    [
        (signal.SIGUSR1, "RUNNING", [f"requeue {JOB}"], "is queued again and will continue"),
        (signal.SIGTERM, "RUNNING", [f"show job {JOB}", f"requeue {JOB}"], "is queued again and will continue"),
        (signal.SIGTERM, "CANCELLED", [f"show job {JOB}"], "is CANCELLED and not queued again"),
        (signal.SIGINT, "RUNNING", [], "start the same command again to continue"),
    ],
)
def test_a_job_of_slurm_is_queued_again_unless_it_was_meant_to_end(
    signum: signal.Signals, state: str, calls: list[str], words: str, slurm: FakeSlurm, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    slurm.set_state(state)
    model = fit(tmp_path / "run", At("on_train_batch_start", 2, signum))
    assert (model.code, slurm.calls) == (75, calls)
    assert words in capfd.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / "step-000000002.ckpt").exists()


def test_the_task_of_an_array_is_queued_again_by_its_own_number(
    slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    fit(tmp_path / "run", At("on_train_batch_start", 2, signal.SIGUSR1))
    assert slurm.calls == ["requeue 70_3"]


def test_a_job_that_cannot_be_queued_again_says_why(
    slurm: FakeSlurm, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (slurm.folder / "bin" / "scontrol").write_text("#!/bin/sh\necho 'Requeue is disabled' >&2; exit 1\n")
    model = fit(tmp_path / "run", At("on_train_batch_start", 2, signal.SIGUSR1))
    assert model.code == 75
    assert f"job {JOB} could not be queued again (Requeue is disabled)" in capfd.readouterr().err


def test_requeueing_can_be_switched_off(slurm: FakeSlurm, tmp_path: Path) -> None:
    plugin = SLURMEnvironment(auto_requeue=False)
    model = fit(tmp_path / "run", At("on_train_batch_start", 2, signal.SIGUSR1), plugins=[plugin])
    assert (model.code, slurm.calls) == (75, [])
