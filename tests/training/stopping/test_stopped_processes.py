"""Stopping by a signal as on a cluster: real processes, the examples of the project, and a fake scheduler."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_slurm import JOB, FakeSlurm, wait_until

from ssmpretrain.cli import main

ROOT = Path(__file__).parents[3]
RECIPE = """
model:
  class_path: ssmpretrain.objectives.MAE
  init_args:
    encoder: test_vim
    encoder_args: {img_size: 32, patch_size: 8, embed_dim: 32, depth: 2}
    decoder_embed_dim: 32
    decoder_depth: 1
data:
  class_path: ssmpretrain.datamodules.ImageShards
  init_args: {train: data.tar, val: data.tar, image_size: 32, batch_size: 4, num_workers: 1}
trainer:
  {accelerator: cpu, max_epochs: 2, num_sanity_val_steps: 0, log_every_n_steps: 1, enable_progress_bar: false}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_shard: Callable[..., Path]) -> Iterator[Path]:
    """A working folder with data and a recipe of two epochs, 60 steps in all for one rank."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_shard(tmp_path / "data.tar", count=120)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    yield tmp_path
    for line in left_over(tmp_path).splitlines():  # of a test that failed
        os.kill(int(line.split()[0]), signal.SIGKILL)


def steps(run: Path) -> list[int]:
    """Training steps in the metrics of a run."""
    path = run / "metrics.jsonl"
    return [step for step, _ in losses(run)] if path.exists() else []


def losses(run: Path) -> list[tuple[int, float]]:
    """Step and loss, in the order of the metrics of a run; equal to the last bit or not at all."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]


def left_over(folder: Path) -> str:
    """Processes that still work for the run."""
    return subprocess.run(["pgrep", "-fa", f"run_dir {folder}"], capture_output=True, text=True).stdout


def our_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("ssmpretrain: ")]


@pytest.mark.slow
def test_a_job_whose_every_process_gets_sigterm_saves_leaves_with_75_and_goes_on(folder: Path) -> None:
    command = [sys.executable, "-m", "ssmpretrain", "fit", "--config", "recipe.yaml", "--run_dir", str(folder / "run")]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_until(lambda: len(steps(folder / "run")) > 2)
    os.killpg(run.pid, signal.SIGTERM)  # loader workers too
    err = run.communicate(timeout=60)[1]
    assert run.returncode == 75, err
    stopped, line = steps(folder / "run"), our_lines(err)[-1]
    assert line.startswith(f"ssmpretrain: stopped by SIGTERM at step {len(stopped)} (epoch ")
    assert f"saved {folder}/run/checkpoints/step-{len(stopped):09d}.ckpt" in line
    assert "Traceback" not in err
    assert not left_over(folder)
    assert main(command[3:]) == 0
    assert main([*command[3:-1], "whole"]) == 0
    assert losses(folder / "run") == losses(folder / "whole")
    assert len(losses(folder / "whole")) == 60


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_command_that_is_told_to_stop_while_it_starts_stops_at_once(
    signum: signal.Signals, code: int, folder: Path
) -> None:
    command = [sys.executable, "-m", "ssmpretrain", "fit", "--config", "recipe.yaml", "--run_dir", str(folder / "run")]
    # As soon as the command has its handlers: they are there before torch is imported.
    start = "import os, signal, sys; import ssmpretrain.cli as cli; packaged = cli.with_packaged_recipes;"
    start += "signal.signal(signal.SIGINT, signal.default_int_handler);"  # ignored in a job of the background
    start += f"cli.with_packaged_recipes = lambda *given: os.kill(os.getpid(), {int(signum)}) or packaged(*given);"
    start += "sys.exit(cli.main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", start, *command[3:]], capture_output=True, text=True, timeout=60)
    assert (done.returncode, len(our_lines(done.stderr))) == (code, 1), done.stderr
    assert not (folder / "run").exists()


@pytest.mark.slow
def test_a_slurm_job_signalled_in_one_task_is_saved_queued_again_and_completed(folder: Path) -> None:
    slurm = FakeSlurm(folder / "slurm")
    script = folder / "job.sbatch"
    script.write_text((ROOT / "examples" / "slurm.sbatch").read_text().replace("per-node=8", "per-node=2"))
    words = ["--config", "recipe.yaml", "--run_dir", str(folder / "run")]
    job = slurm.start(script, *words, stderr=subprocess.PIPE)
    wait_until(lambda: len(steps(folder / "run")) > 2)
    slurm.signal_tasks(signal.SIGUSR1, 1)
    err = job.communicate(timeout=60)[1]
    assert job.returncode == 75, err
    assert slurm.calls == [f"requeue {JOB}"]
    assert our_lines(err)[-1].endswith(f"job {JOB} is queued again and will continue")
    assert not left_over(folder)
    assert slurm.asked_to_requeue()
    job = slurm.start(script, *words, stderr=subprocess.PIPE)
    err = job.communicate(timeout=120)[1]
    assert job.returncode == 0, err
    assert not slurm.asked_to_requeue()
    assert steps(folder / "run") == list(range(30))


@pytest.mark.slow
def test_the_torchrun_example_starts_a_stopped_run_again_until_it_is_complete(folder: Path) -> None:
    slurm = FakeSlurm(folder / "slurm")  # for its `python`
    environment = {**os.environ, "PATH": f"{slurm.folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "GPUS": "2"}
    words = ["--config", "recipe.yaml", "--run_dir", str(folder / "run"), "--trainer.max_time", "00:00:00:01"]
    script = [str(ROOT / "examples" / "torchrun.sh"), *words]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "stopped by max_time at step" in done.stderr
    assert steps(folder / "run") == list(range(30))
