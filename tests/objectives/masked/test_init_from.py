"""Continued pretraining: the encoder of another run or file, with a fresh decoder or head."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from ssmpretrain.datamodules import ImageShards
from ssmpretrain.encoders import create_encoder, load_encoder
from ssmpretrain.objectives import ARM, MAE, Finetune, Pretraining, SimMIM
from ssmpretrain.objectives.restore import load_objective

VIM = {"img_size": 64}
NARROW = {"decoder_embed_dim": 32, "decoder_depth": 1}
SMALL_ARM = {"cluster_size": 2, "decoder_num_heads": 4, **NARROW}


def trainer(folder: Path) -> Trainer:
    return Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, default_root_dir=folder, limit_val_batches=0,
    )  # fmt: skip


def saved(model: LightningModule, path: Path) -> str:
    """A checkpoint of a model, as a run writes it."""
    writer = trainer(path.parent)
    writer.strategy.connect(model)
    writer.save_checkpoint(path)
    return str(path)


def moved(model: Any) -> Any:
    """A model whose weights are those of no fresh one."""
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(torch.randn_like(parameter) / 100)
    return model


def differing(encoder: Any, other: Any) -> list[str]:
    theirs = other.state_dict()
    return [name for name, value in encoder.state_dict().items() if not torch.equal(value, theirs[name])]


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (lambda: MAE("test_vim", VIM, **NARROW), lambda path: SimMIM(init_from=path, mask_unit=16)),
        (lambda: SimMIM("test_vmamba"), lambda path: MAE(init_from=path, **NARROW)),
        (lambda: Finetune("test_mambaout", num_classes=3), lambda path: SimMIM(init_from=path)),
        (lambda: ARM("test_arm", VIM, **SMALL_ARM), lambda path: ARM(init_from=path, **SMALL_ARM)),
    ],
    ids=["MAE to SimMIM", "SimMIM to MAE", "labels to SimMIM", "ARM to ARM"],
)
def test_the_encoder_of_another_run_is_taken_over_whole_and_trains(
    source: Callable[[], Any], target: Callable[[str], Pretraining], tmp_path: Path
) -> None:
    torch.manual_seed(5)
    run = moved(source())
    model = target(saved(run, tmp_path / "run.ckpt"))
    own = {name for name in model.encoder.state_dict() if not name.startswith("head.fc.")}
    assert [name for name in differing(model.encoder, run.encoder) if name in own] == []
    assert model.encoder_name == run.encoder_name == model.hparams["encoder"]
    picture = torch.randn(2, 3, 64, 64)
    model.loss(picture, model.reconstruct(picture)).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_published_file_gives_the_encoder_too(tmp_path: Path) -> None:
    encoder = create_encoder("test_arm", num_classes=0, directions=1, img_size=64)
    official = {name.replace("norm_f.", "norm_4."): value for name, value in encoder.state_dict().items()}
    torch.save({"model": official}, tmp_path / "published.pth")
    model = ARM("test_arm", init_from=str(tmp_path / "published.pth"), **SMALL_ARM)
    assert differing(model.encoder, encoder) == [] and "directions" not in model.encoder_args


class Once(ImageShards):
    """Batches of two images."""

    def __init__(self, shard: str, image_size: int) -> None:
        super().__init__(train=shard, val=shard, image_size=image_size, batch_size=2, num_workers=0)


@pytest.mark.parametrize("kind", ["SimMIM", "ARM"])
def test_a_run_of_another_size_says_what_it_begins_with_and_comes_back_without_its_source(
    kind: str, tmp_path: Path, write_shard: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    makers: dict[str, Callable[..., Any]] = {
        "SimMIM": lambda **changes: SimMIM(mask_unit=16, **changes),
        "ARM": lambda **changes: ARM(**SMALL_ARM, **changes),
    }
    names = {"SimMIM": "test_vim", "ARM": "test_arm"}
    run = moved(makers[kind](encoder=names[kind], encoder_args=VIM))
    source = saved(run, tmp_path / "source.ckpt")
    model = makers[kind](init_from=source)
    chosen = trainer(tmp_path)
    with caplog.at_level(logging.INFO):
        chosen.fit(model, datamodule=Once(str(write_shard(tmp_path / "x.tar", size=96)), 96))
    assert "positions resized from 4 x 4 to 6 x 6 patches" in caplog.text
    fresh = {
        "SimMIM": "mask_token, prediction_head",
        "ARM": "query_token, decoder_embed, decoder, decoder_norm, decoder_pred",
    }
    assert f"{kind}: the encoder begins with the weights of {source}; fresh are {fresh[kind]}" in caplog.text
    chosen.save_checkpoint(tmp_path / "last.ckpt")
    Path(source).unlink()
    again = load_objective(tmp_path / "last.ckpt").model
    assert type(again).__name__ == kind and differing(again, model) == []
    args = {"directions": 1} if kind == "ARM" else {}
    assert differing(load_encoder(tmp_path / "last.ckpt", **args), model.encoder) == []


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("test_vim", ARM, r"ARM: the encoder scans in one direction here .*; 'test_vim' does not\. Choose arm_.*; got "
         r"init_from .*x\.ckpt"),
        ("test_arm", ARM, r"directions=1 reads an ARM encoder as pretrained.*got a file with four"),
        ("test_resnet", SimMIM, r"SimMIM: the mask token replaces .*'test_resnet' \(ResNet\) has none that is known"),
        ("test_mambaout", MAE, r"MAE: the encoder runs on the visible patches alone; 'test_mambaout' cannot"),
    ],
)  # fmt: skip
def test_a_source_with_another_class_of_encoder_is_refused(
    source: str, target: type[Pretraining], message: str, tmp_path: Path
) -> None:
    path = saved(Finetune(source, num_classes=2), tmp_path / "x.ckpt")
    make: Any = target
    with pytest.raises(ValueError, match=message):
        make(init_from=path)


def test_a_source_of_another_name_than_the_encoder_is_refused(tmp_path: Path) -> None:
    path = saved(SimMIM("test_vmamba"), tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"x\.ckpt"):
        SimMIM("test_vim", init_from=path)


def test_without_a_name_and_without_a_source_the_default_encoder_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), torch.device("meta"):
        assert SimMIM().encoder_name == "vmamba_tiny_s1l8" and ARM().encoder_name == "arm_base_patch16_224"
    assert "SimMIM: no encoder is named; it takes vmamba_tiny_s1l8" in caplog.text
    assert "ARM: no encoder is named; it takes arm_base_patch16_224" in caplog.text
