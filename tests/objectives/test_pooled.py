"""The pooled feature of a run: which one it is, and that commands compute what the run evaluates."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_run import tiny_clip
from taught_run import Twin

from ssmpretrain.commands.shared.frozen_encoder import FrozenEncoder, load_frozen
from ssmpretrain.encoders import load_encoder, save_encoder
from ssmpretrain.encoders.features.pooled import Pooled
from ssmpretrain.objectives import MAE, Finetune

VIM = {"patch_size": 8, "img_size": 32}
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
RUNS: dict[str, tuple[Callable[[], Any], str]] = {
    "MAE": (lambda: MAE("test_vim", VIM, decoder_embed_dim=32), "mean"),
    "CLIP": (lambda: tiny_clip(encoder_args=VIM), "class"),
    "Finetune": (lambda: Finetune("test_vim", VIM, num_classes=4), "class"),
    "Finetune of VMamba": (lambda: Finetune("test_vmamba", num_classes=4), "mean"),
    "a teacher": (lambda: Twin(encoder_args={"img_size": 32}), "class"),
}


def write_checkpoint(model: Any, path: Path) -> Path:
    """Write the parts of a checkpoint that loading an encoder reads."""
    content: dict[str, Any] = {"state_dict": model.state_dict(), "epoch": 2, "global_step": 8}
    model.on_save_checkpoint(content)
    torch.save(content, path)
    return path


def frozen(path: Path, **given: Any) -> FrozenEncoder:
    options = {"pooling": None, "last_blocks": None, "image_size": 32, "ema": None, "teacher": None}
    return load_frozen(Namespace(checkpoint=path, device="cpu", precision="32", **(options | given)), where="embed")


def differing(model: Any) -> Any:
    """The model with a teacher that differs from the student, if it has one."""
    if hasattr(model, "teacher"):
        for parameter in model.teacher.encoder.parameters():
            parameter.data.mul_(1.1)
    return model.eval()


@pytest.mark.parametrize("name", RUNS)
def test_commands_compute_the_features_that_a_run_evaluates(name: str, tmp_path: Path) -> None:
    make, pooling = RUNS[name]
    torch.manual_seed(0)
    model = differing(make())
    assert model.pooled.pooling == pooling
    encoder = frozen(write_checkpoint(model, tmp_path / "last.ckpt"))
    assert encoder.kind == model.pooled and str(encoder).endswith(f"; {pooling}: the feature that the run reports")
    with torch.no_grad():
        torch.testing.assert_close(encoder(IMAGES), model.evaluated_features(IMAGES), atol=1e-6, rtol=1e-5)


def test_an_export_names_the_feature_and_the_user_may_choose_another(tmp_path: Path) -> None:
    write_checkpoint(RUNS["a teacher"][0](), tmp_path / "last.ckpt")
    save_encoder(load_encoder(tmp_path / "last.ckpt"), tmp_path / "encoder.safetensors")
    encoder = frozen(tmp_path / "encoder.safetensors")
    assert encoder.kind == Pooled("class", 1) and encoder.protocol()["pooling"] == "class"
    encoder = frozen(tmp_path / "encoder.safetensors", pooling="mean")
    assert encoder.kind == Pooled("mean", 1) and encoder.reason == "by --pooling"
    encoder = frozen(tmp_path / "encoder.safetensors", last_blocks=2)
    assert encoder.kind == Pooled("class", 2) and encoder.reason.endswith("blocks by --last-blocks")


def test_a_file_without_the_entry_has_the_mean(tmp_path: Path) -> None:
    path = write_checkpoint(RUNS["CLIP"][0](), tmp_path / "last.ckpt")
    content = torch.load(path)
    del content["pooled"]
    torch.save(content, path)
    assert frozen(path).kind == Pooled("mean", 1)
    assert frozen(path).reason == "by default, as the file names no feature"


@pytest.mark.parametrize("entry", [{"pooling": "all", "last_blocks": 1}, {"pooling": "mean", "last_blocks": 1.5}, {}])
def test_a_malformed_entry_is_refused(entry: dict[str, Any], tmp_path: Path) -> None:
    path = write_checkpoint(RUNS["MAE"][0](), tmp_path / "last.ckpt")
    content = torch.load(path)
    torch.save(content | {"pooled": entry}, path)
    with pytest.raises(ValueError, match=r"the entry pooled of .*last\.ckpt has a pooling, one of class, .*--pooling"):
        frozen(path)
    assert frozen(path, pooling="mean").kind == Pooled("mean", 1)
