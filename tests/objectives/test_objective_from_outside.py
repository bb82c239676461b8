"""An objective of another package, named in a recipe, has all features of the objectives in this package."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import ssmpretrain
from ssmpretrain.cli import main
from ssmpretrain.objectives import Objective, Pretraining
from ssmpretrain.objectives.restore import load_objective, restore

MODULE = '''
import torch
import torch.nn.functional as F
from torch import nn

from ssmpretrain.objectives import MAE, Objective
from ssmpretrain.training import AdamW, Cosine


class Rotation(Objective):
    """Tell by how many quarters an image was turned."""

    def __init__(
        self,
        encoder: str,
        encoder_args: dict | None = None,
        smoothing: float = 0.0,
        optimizer: AdamW = AdamW(),
        schedule: Cosine = Cosine(),
    ) -> None:
        super().__init__(encoder, encoder_args, optimizer, schedule, smoothing=smoothing)
        self.head = nn.Linear(self.encoder.num_features, 4)

    def loss(self, images):
        turns = torch.arange(len(images), device=images.device) % 4
        turned = torch.stack([image.rot90(int(turn), (1, 2)) for image, turn in zip(images, turns)])
        return F.cross_entropy(self.head(self.encoder(turned)), turns, label_smoothing=self.hparams["smoothing"])

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch["image"])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch["image"]))


class Absolute(MAE):
    def pixel_error(self, predicted, targets):
        return (predicted - targets).abs()
'''

RECIPE: dict[str, Any] = {
    "seed_everything": 0,
    "model": {
        "class_path": "turned_images.Rotation",
        "init_args": {
            "encoder": "test_vim",
            "encoder_args": {"patch_size": 8, "embed_dim": 32, "depth": 2},
            "smoothing": 0.1,
            "optimizer": {"lr_per_256": 0.01, "betas": [0.9, 0.99]},
            "schedule": {"warmup_epochs": 0},
        },
    },
    "data": {
        "class_path": "ssmpretrain.datamodules.ImageShards",
        "init_args": {"train": "x.tar", "val": "x.tar", "image_size": 32, "batch_size": 4, "num_workers": 0},
    },
    "trainer": {
        "accelerator": "cpu", "devices": 1, "max_steps": 2, "limit_val_batches": 1,
        "num_sanity_val_steps": 0,
    },
}  # fmt: skip


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that has the objectives, importable from the working folder."""
    (tmp_path / "turned_images.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("turned_images")
    sys.modules.pop("turned_images", None)


def test_it_trains_goes_on_validates_and_its_checkpoint_is_read(
    package: Any, write_shard: Callable[..., Path], tmp_path: Path
) -> None:
    write_shard(tmp_path / "x.tar")
    Path("recipe.json").write_text(json.dumps(RECIPE))
    assert main(["fit", "--config", "recipe.json", "--run_dir", "run"]) == 0
    assert "class_path: turned_images.Rotation" in Path("run/config.yaml").read_text()
    assert (
        main(["fit", "--config", "recipe.json", "--run_dir", "run", "--trainer.max_steps", "4", "--allow_changes"]) == 0
    )
    assert main(["validate", "--config", "recipe.json", "--run_dir", "run"]) == 0
    steps = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in steps if "val/loss" in row) >= 3

    checkpoint = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 4 and checkpoint["objective_class"] == "turned_images.Rotation"
    encoder = ssmpretrain.load_encoder("run")
    assert encoder.load_report.loaded == encoder.load_report.total
    restored = restore(checkpoint, "run/checkpoints/last.ckpt", Objective)
    assert restored is not None and type(restored.model) is package.Rotation
    assert restored.model.hparams["smoothing"] == 0.1 and restored.model.optimizer_settings.betas == (0.9, 0.99)
    assert restored.images["size"] == [32, 32] and restored.origin["step"] == 4
    states = encoder.state_dict(), restored.model.encoder.state_dict(), checkpoint["state_dict"]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]) and torch.equal(value, states[2][f"encoder.{name}"])


def test_a_pretraining_of_another_package_is_restored_once_its_module_is_imported(package: Any) -> None:
    model = package.Absolute("test_vim", {"patch_size": 8, "embed_dim": 32, "depth": 2, "img_size": 32})
    content = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    model.on_save_checkpoint(content)
    torch.save(content, "x.ckpt")
    assert type(load_objective("x.ckpt").model) is package.Absolute and issubclass(package.Absolute, Pretraining)
    torch.save({**content, "objective_class": "nowhere.Absolute"}, "y.ckpt")
    with pytest.raises(ValueError, match=r"y\.ckpt is of a run of nowhere\.Absolute, .* --trust"):
        load_objective("y.ckpt")


def test_reconstruct_imports_a_module_that_the_user_trusts_and_no_other(
    package: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = package.Absolute("test_vim", {"patch_size": 8, "embed_dim": 32, "depth": 2, "img_size": 32})
    images = {"size": [32, 32], "mean": [0.5] * 3, "std": [0.3] * 3}
    content = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams), "images": images}
    model.on_save_checkpoint(content)
    torch.save(content, "x.ckpt")
    Image.new("RGB", (40, 40), "red").save("red.png")
    del sys.modules["turned_images"]
    assert main(["reconstruct", "x.ckpt", "red.png"]) == 2 and "turned_images" not in sys.modules
    assert "name the module with --trust" in capsys.readouterr().err
    assert main(["reconstruct", "x.ckpt", "red.png", "--trust", "turned_images"]) == 0
    assert "Absolute of test_vim, 1 images of 32 x 32" in capsys.readouterr().out
