"""Every recipe parses and takes two shrunken steps."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from ssmpretrain.cli import main

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_takes_two_shrunken_steps(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_shard: Callable[..., Path]
) -> None:
    monkeypatch.chdir(tmp_path)
    written = yaml.safe_load(recipe.read_text())
    shard = str(write_shard(tmp_path / "train.tar"))
    shrunken = {
        "model": {"encoder": "test_vim", "decoder_embed_dim": 32},
        "data": {"train": shard, "val": shard, "image_size": 32, "batch_size": 2, "num_workers": 0},
        "trainer": {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "precision": 32, "max_epochs": 1,
                    "limit_train_batches": 2, "limit_val_batches": 2, "check_val_every_n_epoch": 1},
    }  # fmt: skip
    if written["data"]["class_path"].endswith("Digits"):
        monkeypatch.setenv("SSMPRETRAIN_CACHE", str(tmp_path / "cache"))
        shrunken["model"] = {}
        shrunken["data"] = {"batch_size": 2, "train_images": 8, "val_images": 4}
    words = [f"--{section}.{key}={value}" for section, settings in shrunken.items() for key, value in settings.items()]
    assert main(["fit", "--config", str(recipe), *words]) == 0
    checkpoint = torch.load(tmp_path / "runs" / recipe.stem / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_opens_with_what_it_is_and_how_to_start_it(recipe: Path) -> None:
    header = [line for line in recipe.read_text().splitlines() if line.startswith("#")]
    assert recipe.stem == "quickstart" or any("Not run at this scale yet" in line for line in header)
    assert any("python -m ssmpretrain" in line for line in header)
    assert len(header[0]) <= 120


@pytest.mark.parametrize("recipe", [path for path in RECIPES if path.stem.startswith("mae_vim")], ids=lambda p: p.stem)
def test_published_batch_and_peak_learning_rate(recipe: Path) -> None:
    written = yaml.safe_load(recipe.read_text())
    trainer, model = written["trainer"], written["model"]["init_args"]
    batch = written["data"]["init_args"]["batch_size"] * trainer["devices"] * trainer["num_nodes"]
    assert batch == 4096
    assert model["optimizer"]["lr_per_256"] * batch / 256 == pytest.approx(2.4e-3)
    assert trainer["max_epochs"] == 1600 and model["schedule"]["warmup_epochs"] == 40 and model["mask_ratio"] == 0.75
