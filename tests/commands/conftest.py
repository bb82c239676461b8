"""A run folder and images for the commands that look at a checkpoint."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image

from ssmpretrain.cli import main
from ssmpretrain.datamodules import ImageShards
from ssmpretrain.objectives import MAE


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory, write_shard: Callable[..., Path]) -> Path:
    """What `fit` leaves of one step of MAE on images of 32 x 32 pixels."""
    folder = tmp_path_factory.mktemp("run")
    shard = str(write_shard(folder / "train.tar"))
    torch.manual_seed(0)
    model = MAE("test_vim", {"patch_size": 8}, decoder_embed_dim=32)
    trainer = Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, default_root_dir=folder, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(model, ImageShards(train=shard, val=shard, image_size=32, batch_size=4, num_workers=0))
    trainer.save_checkpoint(folder / "checkpoints" / "last.ckpt")
    return folder


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Exit code, standard output and our own lines of standard error of a command."""

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, "\n".join(line for line in err.splitlines() if line.startswith("ssmpretrain: "))

    return call


@pytest.fixture
def image_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten images of several sizes in the folder `images` of an otherwise empty working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    noise = torch.Generator().manual_seed(0)
    for number in range(10):
        pixels = torch.randint(256, (40 + number, 50, 3), dtype=torch.uint8, generator=noise)
        Image.fromarray(pixels.numpy()).save(tmp_path / "images" / f"{number}.png")
    return tmp_path / "images"
