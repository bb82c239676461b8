"""The programs of examples/: each one runs and reaches a number that a guess does not."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import start
from PIL import Image

import ssmpretrain
from ssmpretrain.cli import main

EXAMPLES = Path(__file__).parents[1] / "examples"
FEW = ["--data", "examples.custom_dataset.HandwrittenDigits", "--data.image_size", "16", "--trainer.max_epochs", "1"]
SMALL = ["--model.encoder_args", "{img_size: 16, patch_size: 4, embed_dim: 64, depth: 2}"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train `custom_objective` on `custom_dataset` for 23 steps, from the command line."""
    folder = tmp_path_factory.mktemp("runs") / "rotation"
    command = ["fit", "--config", str(EXAMPLES / "custom_objective.yaml"), "--run_dir", str(folder), *FEW, *SMALL]
    assert main(command) == 0
    return folder


def test_custom_objective_learns_and_its_encoder_loads(run_folder: Path) -> None:
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["val/accuracy"] for row in rows if "val/accuracy" in row][-1] > 0.4  # of four angles
    report = ssmpretrain.load_encoder(run_folder).load_report
    assert report.encoder == "test_vim" and "Rotation" in str(report)


def test_custom_dataset_trains_mae_below_what_the_mean_of_each_patch_costs() -> None:
    assert runpy.run_path(str(EXAMPLES / "custom_dataset.py"))["main"](epochs=2) < 0.8


def test_plain_pytorch_fine_tunes_an_encoder(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "encoder.safetensors"
    ssmpretrain.save_encoder(ssmpretrain.load_encoder(run_folder), file)
    monkeypatch.setattr(sys, "argv", ["finetune_plain_pytorch.py", str(file), "--epochs", "2"])
    runpy.run_path(str(EXAMPLES / "finetune_plain_pytorch.py"), run_name="__main__")
    assert float(capsys.readouterr().out.split("accuracy ")[-1]) > 0.5  # of ten digits


@pytest.mark.parametrize("name", ["slurm.sbatch", "torchrun.sh"])
def test_scripts_are_valid_bash(name: str) -> None:
    subprocess.run(["bash", "-n", str(EXAMPLES / name)], check=True)


def test_custom_encoder_is_pretrained_exported_and_loaded() -> None:
    done = start(EXAMPLES / "custom_encoder.py")  # a process of its own: its name goes into timm's registry
    assert done.returncode == 0, done.stderr
    loss, report = done.stdout.removeprefix("loss ").split("; ")[:2]
    assert 0.5 < float(loss) < 3 and report.startswith("tiny_scan_patch16_224 from ") and "missing none" in done.stdout


def test_every_program_is_run_here() -> None:
    here = Path(__file__).read_text()
    assert [program.name for program in EXAMPLES.glob("*.py") if program.stem not in here] == []


def test_views_of_a_recipe_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "views.yaml"
    views = "[{size: 32}, {count: 5, size: 8, local: true, photometric: {hue: 0.1}}]"
    recipe.write_text(
        "data:\n  class_path: ssmpretrain.datamodules.ImageShards\n"
        f"  init_args: {{train: nowhere.tar, image_size: 32, views: {views}}}\n"
    )
    draw = runpy.run_path(str(EXAMPLES / "show_views.py"))["main"]
    draw(str(tmp_path / "views.png"), str(recipe), rows=3)
    assert capsys.readouterr().out == f"3 draws of 1 global and 5 local views: {tmp_path}/views.png\n"
    with Image.open(tmp_path / "views.png") as picture:
        assert picture.size == (32 + 6 + 8 + 6 + 8 + 6 + 8, 3 * 32 + 2 * 6)  # two small views fit below one another
