"""Objectives that predict patches: image sizes, content of checkpoints, and restoring an objective."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

import ssmpretrain
from ssmpretrain.datamodules import ImageShards
from ssmpretrain.objectives import MAE, Reconstruction
from ssmpretrain.objectives.restore import load_objective


def data(write_shard: Callable[..., Path], tmp_path: Path, size: int) -> ImageShards:
    shard = str(write_shard(tmp_path / "train.tar"))
    return ImageShards(train=shard, val=shard, image_size=size, batch_size=2, num_workers=0)


def fit(model: MAE, images: ImageShards, tmp_path: Path) -> Path:
    trainer = Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, default_root_dir=tmp_path, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(model, datamodule=images)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def settings(encoder: str) -> dict[str, Any]:
    return {"encoder": encoder, "decoder_embed_dim": 32}


@pytest.mark.parametrize("encoder", ["test_vim", "test_vit"])
def test_encoder_of_fixed_size_fits_the_data_and_comes_back_so(
    encoder: str, tmp_path: Path, write_shard: Callable[..., Path]
) -> None:
    model = MAE(**settings(encoder))
    checkpoint = fit(model, data(write_shard, tmp_path, 48), tmp_path)
    assert model.encoder_args == {"img_size": [48, 48]}
    run = load_objective(checkpoint)
    again, content = run.model, run.content
    size_and_scale = {"size": [48, 48], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    assert size_and_scale.items() <= content["images"].items()
    assert content["data"]["class"] == "ImageShards" and content["data"]["samples"] > 0
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    picture = torch.randn(1, 3, 48, 48)
    seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
    assert torch.equal(
        model.eval().reconstruct(picture, seeds[0]).predicted, again.reconstruct(picture, seeds[1]).predicted
    )
    assert ssmpretrain.load_encoder(checkpoint).patch_embed.img_size == (48, 48)


def test_image_size_that_does_not_fit_the_patches_is_found_before_training(
    tmp_path: Path, write_shard: Callable[..., Path]
) -> None:
    with pytest.raises(ValueError, match=r"squares of 16 x 16 pixels.*got 40 x 40 pixels.*multiple of 16, 32 or more"):
        fit(MAE(**settings("test_vim")), data(write_shard, tmp_path, 40), tmp_path)


def test_size_named_for_a_strict_encoder_must_be_that_of_the_data(
    tmp_path: Path, write_shard: Callable[..., Path]
) -> None:
    model = MAE(encoder="deit_tiny_patch16_224", encoder_args={"img_size": 64, "depth": 1}, decoder_embed_dim=32)
    with pytest.raises(ValueError, match=r"img_size 64 and data.image_size \[32, 32\]\. Leave encoder_args.img_size"):
        fit(model, data(write_shard, tmp_path, 32), tmp_path)


@pytest.mark.parametrize("content", [{"model": {"a": torch.zeros(1)}}, {"objective": "Path", "state_dict": {}}, [1]])
def test_file_without_an_objective_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="holds no pretraining objective"):
        load_objective(tmp_path / "x.ckpt")


def test_pictures_show_the_prediction_where_patches_were_hidden_and_grey_where_there_is_nothing() -> None:
    model = MAE("test_vim", {"img_size": [16, 32]}, decoder_embed_dim=32, normalize_targets=False)
    model.column_titles = ("seen", "guess")
    black, white = torch.full((2, 3, 16, 32), -2.0), torch.full((2, 2, 768), 3.0)  # with mean 0.5 and deviation 0.25
    hidden = torch.tensor([[True, False]] * 2)  # the left patch
    columns = model.pictures(black, Reconstruction(white, hidden), [0.5] * 3, [0.25] * 3)
    assert list(columns) == ["image", "seen (50%)", "guess", "seen + guess"]
    halves = [(column[..., :16].unique().tolist(), column[..., 16:].unique().tolist()) for column in columns.values()]
    (grey,) = halves[1][0]
    assert halves == [([0], [0]), ([grey], [0]), ([1], [grey]), ([1], [0])] and 0.7 < grey < 0.95
