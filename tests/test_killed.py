"""A run that is killed again and again, at any moment, is the run that was left alone."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

RECIPE = """
seed_everything: 3
model:
  class_path: ssmpretrain.objectives.MAE
  init_args:
    encoder: test_vim
    encoder_args: {img_size: 16, patch_size: 4, drop_path_rate: 0.3}
    decoder_embed_dim: 16
    optimizer: {lr_per_256: 0.1}
    schedule: {warmup_epochs: 1}
data:
  class_path: ssmpretrain.datamodules.ImageShards
  init_args: {train: train-*.tar, val: train-000001.tar, image_size: 16, batch_size: 4, shuffle_buffer: 30}
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 8
  accumulate_grad_batches: 2
  log_every_n_steps: 1
  num_sanity_val_steps: 0
  enable_progress_bar: false
  callbacks:
    - class_path: ssmpretrain.callbacks.EMA
      init_args: {decay: 0.9}
    - class_path: ssmpretrain.callbacks.SampleLog
checkpoints: {every_n_steps: 2}
"""


def start(folder: Path, run: str, workers: int) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "ssmpretrain", "fit", "--config", "r.yaml", "--run_dir", run]
    words += ["--data.num_workers", str(workers)]
    return subprocess.Popen(words, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def without_times(path: Path) -> list[dict[str, Any]]:
    timed = {"time", "train/images_per_second", "train/data_wait"}
    kept = [{name: value for name, value in row.items() if name not in timed} for row in rows(path)]
    return [row for row in kept if row.keys() - {"step", "epoch"}]


@pytest.mark.slow
def test_twenty_kills_in_a_row_change_nothing(make_shards: Any) -> None:
    folder = make_shards([50, 3, 40, 27])  # 120 samples: 15 steps an epoch, 120 in all
    (folder / "r.yaml").write_text(RECIPE)
    assert start(folder, "whole", 2).wait() == 0
    chance = random.Random(0)
    log = folder / "killed" / "samples-rank0.jsonl"
    for kill in range(20):
        job = start(folder, "killed", kill % 3)
        before = lines(log)
        steps = chance.randint(3, 9)
        while lines(log) < before + steps and job.poll() is None and time.sleep(0.002) is None:
            before = min(before, lines(log))  # what was not saved is taken back at the start
        time.sleep(chance.random() * 0.05)
        assert job.poll() is None, job.communicate()[0]
        by = signal.SIGKILL if kill % 2 else signal.SIGTERM
        job.send_signal(by)
        out, _ = job.communicate(timeout=60)
        assert job.returncode == (75 if by == signal.SIGTERM else -signal.SIGKILL), out
    job = start(folder, "killed", 1)
    out, _ = job.communicate()
    assert job.returncode == 0 and "continuing" in out, out

    assert rows(log) == rows(folder / "whole" / "samples-rank0.jsonl")
    counted = [key for row in rows(log) for key in row["keys"]]
    assert len(counted) == 8 * 120 and all(counted.count(key) == 8 for key in set(counted))
    assert without_times(folder / "killed" / "metrics.jsonl") == without_times(folder / "whole" / "metrics.jsonl")
    ends = [torch.load(folder / run / "checkpoints" / "last.ckpt", weights_only=True) for run in ("whole", "killed")]
    for part in ("state_dict", "current_model_state"):
        assert all(torch.equal(ends[1][part][name], value) for name, value in ends[0][part].items())
