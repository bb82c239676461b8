"""Several ranks train like one process. They agree before they start, and none waits for a lost rank."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import report_of, start

from ssmpretrain.cli import main

# float32: a sum over eight images in another order, 6e-8 a rounding; the steps of AdamW make no more of it.
ROUNDING = 2e-6


@pytest.fixture(scope="module")
def compared() -> dict[str, Any]:
    return report_of("ranks_job.py", "ddp")


@pytest.mark.parametrize("job", ["MAE on 4", "SimMIM on 2", "Finetune on 4", "DINO on 2", "iBOT on 4"])
def test_gradients_losses_and_averages_are_those_of_a_single_process(job: str, compared: dict[str, Any]) -> None:
    result = compared[job]
    assert result["gradients"] < ROUNDING and result["losses"] < ROUNDING and result["weights"] < ROUNDING
    assert result["parameters equal"]


def test_a_probe_with_batch_normalisation_has_equal_parameters_on_all_ranks(compared: dict[str, Any]) -> None:
    assert compared["LinearProbe on 2"]["parameters equal"]


@pytest.mark.parametrize("ranks", ["1", "2", "4"])
def test_sinkhorn_knopp_balances_the_rows_of_all_ranks_however_many_each_has(
    ranks: str, compared: dict[str, Any]
) -> None:
    assert compared["sinkhorn"][ranks] < ROUNDING


def test_a_nan_on_one_rank_is_skipped_by_all(compared: dict[str, Any]) -> None:
    result = compared["a NaN"]
    assert result["skipped"] == [1, 1]
    assert result["parameters equal"] and max(result["gradients"], result["weights"]) < ROUNDING


# Killed and continued


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, write_shard: Callable[..., Path]) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("killed")
    write_shard(folder / "train-000000.tar", 42, 16)  # 5 steps of 8 an epoch; one shard for all ranks
    return report_of("killed_job.py", folder)


def test_when_a_rank_is_killed_the_others_stop_and_one_line_names_it(killed: dict[str, Any]) -> None:
    assert killed["killed"] == killed["killed again"] == [1, None]
    assert killed["stderr"].count("ssmpretrain: rank 1 (") == 2 and "Start the same command again" in killed["stderr"]
    assert "Traceback" not in killed["stderr"]


def test_the_run_goes_on_as_if_nobody_had_been_killed(killed: dict[str, Any]) -> None:
    assert killed["continued"] == killed["whole"] == [0, 0]
    assert killed["difference"] == 0  # weights, averages and moments, to the last bit
    assert killed["runs"]["killed"] == killed["runs"]["whole"]


def test_each_sample_is_trained_once_an_epoch_also_when_other_ranks_go_on(killed: dict[str, Any]) -> None:
    assert killed["continued on 4"] == [0, 0, 0, 0]
    for run in killed["runs"].values():
        assert run["samples"] == {"0": 40, "1": 40, "2": 40} and run["most often"] == 1 and run["steps"] == 15


def test_ranks_started_with_other_options_stop_with_one_message(killed: dict[str, Any]) -> None:
    assert killed["disagreeing"] == [2, 2]
    assert killed["stderr"].count("model.init_args.mask_ratio is 0.5, on rank 0 0.75") == 1


RECIPE = """
model:
  class_path: ssmpretrain.objectives.MAE
  init_args: {encoder: test_vim, encoder_args: {img_size: 32, patch_size: 8}, decoder_embed_dim: 16, decoder_depth: 1}
data: {class_path: ssmpretrain.datamodules.Digits, init_args: {image_size: 32, batch_size: 4, num_workers: 0}}
trainer:
  accelerator: cpu
  devices: 2
  max_epochs: 1
  enable_progress_bar: false
  callbacks: [{class_path: dying.Die, init_args: {rank: RANK, step: 3}}]
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["", "torchrun"])
@pytest.mark.parametrize("rank", [0, 1])
def test_no_process_is_left_whoever_is_killed_and_whoever_started_it(rank: int, launcher: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("RANK", str(rank)))
    words = ["-m", "ssmpretrain", "fit", f"--config={recipe}", f"--run_dir={tmp_path / 'run'}"]
    if launcher:
        rendezvous = ["--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
        words = ["-m", "torch.distributed.run", *rendezvous, *words]
    done = start(*words, timeout=60)  # communicate() waits for all that hold its pipes, so for every rank
    assert done.returncode == (-9 if rank == 0 and not launcher else 1)
    assert done.stderr.count(f"ssmpretrain: rank {rank} (") == 1


def test_processes_that_torchrun_started_for_a_recipe_of_one_device_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("devices: 2", "devices: 1").split("  callbacks")[0])
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 4, "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, str(value))
    assert main(["fit", f"--config={recipe}", f"--run_dir={tmp_path / 'run'}"]) == 2
    message = capsys.readouterr().err
    assert "4 processes" in message and "--trainer.devices" in message
