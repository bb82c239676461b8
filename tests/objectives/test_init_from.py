"""Encoders that pass from one objective to another: DINO and LeJEPA as sources, and as targets of every other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from pairs import TEXT

from ssmpretrain.encoders import create_encoder
from ssmpretrain.objectives import ARM, CLIP, DINO, MAE, Finetune, LeJEPA, LinearProbe, SimMIM

VIM: dict[str, Any] = {"img_size": 64}
DECODER: dict[str, Any] = {"decoder_embed_dim": 32, "decoder_depth": 1}
HEAD: dict[str, Any] = {"num_prototypes": 16, "head_hidden_dim": 16, "head_bottleneck_dim": 8}
PROJECTOR: dict[str, Any] = {"projector_hidden": [16], "projector_dim": 8}
MAKERS: dict[str, Callable[..., Any]] = {
    "DINO": lambda **source: DINO(**source, **HEAD),
    "iBOT": lambda **source: DINO(**source, ibot=1.0, **HEAD),
    "LeJEPA": lambda **source: LeJEPA(**source, **PROJECTOR),
    "MAE": lambda **source: MAE(**source, **DECODER),
    "SimMIM": lambda **source: SimMIM(**source),
    "ARM": lambda **source: ARM(**source, cluster_size=2, decoder_num_heads=4, **DECODER),
    "CLIP": lambda **source: CLIP(**source, text=TEXT, embed_dim=16),
    "Finetune": lambda **source: Finetune(**source, num_classes=3),
    "LinearProbe": lambda **source: LinearProbe(**source, num_classes=3),
}


def saved(model: LightningModule, path: Path) -> str:
    """A checkpoint of a model, as a run writes it."""
    writer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=path.parent)
    writer.strategy.connect(model)
    writer.save_checkpoint(path)
    return str(path)


def moved(model: Any) -> Any:
    """A model whose weights are those of no fresh one, and whose teacher is another than the student."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 100)
    return model


def differing(encoder: Any, other: Any) -> list[str]:
    theirs = other.state_dict()
    return [name for name, value in encoder.state_dict().items() if not torch.equal(value, theirs.get(name))]


@pytest.mark.parametrize(
    ("source", "target"),
    [*(("DINO", target) for target in ("MAE", "SimMIM", "CLIP", "LinearProbe", "LeJEPA")), ("LeJEPA", "DINO")],
)
def test_every_objective_begins_with_an_encoder_of_dino_or_lejepa(source: str, target: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    run = moved(MAKERS[source](encoder="test_vim", encoder_args=VIM))
    model = MAKERS[target](init_from=saved(run, tmp_path / "run.ckpt"))
    assert differing(model.encoder, run.teacher.encoder if source == "DINO" else run.encoder) == []
    if source == "DINO":
        assert differing(model.encoder, run.encoder) != []
        assert model.encoder.load_report.origin["weights"] == "teacher" and "teacher" in str(model.encoder.load_report)


@pytest.mark.parametrize(
    ("source", "target"), [("MAE", "DINO"), ("SimMIM", "iBOT"), ("CLIP", "LeJEPA"), ("Finetune", "DINO")]
)
def test_dino_and_lejepa_begin_with_the_encoder_of_any_run(source: str, target: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    run = moved(MAKERS[source](encoder="test_vim", encoder_args=VIM))
    model = MAKERS[target](init_from=saved(run, tmp_path / "run.ckpt"))
    own = [name for name in differing(model.encoder, run.encoder) if not name.startswith("head.")]
    assert own == [] and model.encoder_name == "test_vim"
    if hasattr(model, "teacher"):
        assert differing(model.teacher.encoder, model.encoder) == []
    trained = {name for name, parameter in model.encoder.named_parameters() if parameter.requires_grad}
    assert "cls_token" in trained and "patch_embed.proj.weight" in trained


@pytest.mark.parametrize("target", [pytest.param("DINO", marks=pytest.mark.slow), "LeJEPA"])
def test_dino_and_lejepa_begin_with_arm_in_four_directions_and_with_a_published_file(
    target: str, tmp_path: Path
) -> None:
    arm = moved(MAKERS["ARM"](encoder="test_arm", encoder_args=VIM))
    model = MAKERS[target](init_from=saved(arm, tmp_path / "arm.ckpt"))
    report = model.encoder.load_report
    assert model.encoder.directions == 4 and report.copied and report.fresh == ("cls_token",)
    assert torch.equal(model.encoder.layers[0].mixer.conv1d.weight, arm.encoder.layers[0].mixer.conv1d.weight)
    vim = create_encoder("test_vim", num_classes=10, img_size=64)
    torch.save({"model": vim.state_dict()}, tmp_path / "published.pth")
    model = MAKERS[target](encoder="test_vim", init_from=str(tmp_path / "published.pth"))
    assert differing(model.encoder, vim) == [] and model.encoder.load_report.notes == ("head of 10 classes left out",)
