"""Teacher and student in checkpoints: of our runs, of DINO and iBOT, of DINOv2."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from torch import nn

import ssmpretrain

Save = Callable[[dict[str, Any]], Path]


@pytest.fixture(scope="module")
def encoders() -> dict[str, nn.Module]:
    """A student and its teacher, with other weights each."""
    torch.manual_seed(0)
    return {role: ssmpretrain.create_encoder("test_vim", num_classes=0) for role in ("student", "teacher")}


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def save(content: dict[str, Any]) -> Path:
        torch.save(content, tmp_path / "weights.pth")
        return tmp_path / "weights.pth"

    return save


def named(encoder: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in encoder.state_dict().items()}


def head(prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}head.mlp.0.weight": torch.zeros(3, 3), f"{prefix}head.last_layer.weight_v": torch.ones(4, 3)}


def of_our_run(student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
    state = named(student, "encoder.") | head("") | named(teacher, "teacher.encoder.") | head("teacher.")
    state["centre"] = torch.zeros(1, 4)
    about = {
        "objective": "DINO",
        "reported": "teacher",
        "encoder": {"name": "test_vim", "args": {"num_classes": 0}},
        "global_step": 7,
    }
    return {"state_dict": state, **about}


def of_dino(student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
    """As DINO's main_dino.py writes it, and Vim4Path's and Dino-Mamba's; the student is wrapped for DDP."""
    students, teachers = (
        named(student, "module.backbone.") | head("module."),
        named(teacher, "backbone.") | head(""),
    )
    rest = {"optimizer": {"state": {}}, "dino_loss": {"center": torch.zeros(1, 4)}, "epoch": 3}
    return {"student": students, "teacher": teachers, **rest}


def of_ibot(student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
    """The teacher is wrapped too if its head has batch normalisation; the student has a token for masked patches."""
    content = of_dino(student, teacher)
    content["student"]["module.backbone.masked_embed"] = torch.zeros(1, 16)
    content["teacher"] = {f"module.{name}": tensor for name, tensor in content["teacher"].items()}
    return content


def of_dinov2(student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
    states = named(student, "student.backbone.") | named(teacher, "teacher.backbone.")
    return {"model": states | head("student.dino_") | head("teacher.dino_")}


@pytest.mark.parametrize("content", [of_our_run, of_dino, of_ibot, of_dinov2])
def test_the_teacher_is_loaded_unless_the_student_is_asked_for(
    content: Any, encoders: dict[str, nn.Module], save: Save
) -> None:
    path = save(content(**encoders))
    for teacher in (None, True, False):
        loaded = ssmpretrain.load_encoder(path, teacher=teacher)
        role = "student" if teacher is False else "teacher"
        expected = encoders[role].state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
        report = loaded.load_report
        assert report.source.split(" in ")[0] == report.origin["weights"] == role
        assert str(report).endswith(f"weights of the {role}")
        assert ("teacher=False or --no-teacher takes the student" in str(report)) == (teacher is None)


def test_a_vit_of_dino_is_loaded_under_timms_name(save: Save) -> None:
    models = {role: ssmpretrain.create_encoder("vit_tiny_patch16_224", depth=1) for role in ("student", "teacher")}
    for model in models.values():
        model.reset_classifier(0)  # type: ignore[operator]
    path = save(of_dino(**models))
    loaded = ssmpretrain.load_encoder(path, "vit_tiny_patch16_224", 0, depth=1)
    expected = models["teacher"].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


def test_a_published_teacher_alone_is_loaded_and_its_student_is_missed(
    encoders: dict[str, nn.Module], save: Save
) -> None:
    path = save({"teacher": named(encoders["teacher"], "backbone.")})
    assert "--no-teacher" not in str(ssmpretrain.load_encoder(path).load_report)
    with pytest.raises(ValueError, match=r"weights\.pth has no student, only teacher\. Leave `teacher` out\."):
        ssmpretrain.load_encoder(path, teacher=False)


def test_a_teacher_is_missed_where_there_is_none(encoders: dict[str, nn.Module], save: Save) -> None:
    path = save({"model": encoders["student"].state_dict()})
    with pytest.raises(ValueError, match=r"holds no teacher beside its weights\. Leave `teacher` out\."):
        ssmpretrain.load_encoder(path, teacher=True)
    assert ssmpretrain.load_encoder(path, teacher=False).load_report.source == "model"


def test_a_model_beside_another_networks_teacher_comes_first(encoders: dict[str, nn.Module], save: Save) -> None:
    path = save({"model": encoders["student"].state_dict(), "teacher": encoders["teacher"].state_dict()})
    assert ssmpretrain.load_encoder(path).load_report.source == "model"
    assert ssmpretrain.load_encoder(path, teacher=True).load_report.source == "teacher"


def test_a_network_that_a_run_distils_from_is_not_taken_for_its_encoder(
    encoders: dict[str, nn.Module], save: Save
) -> None:
    content = of_our_run(**encoders)
    del content["reported"]
    loaded = ssmpretrain.load_encoder(save(content))
    assert loaded.load_report.source == "state_dict"
    assert torch.equal(loaded.state_dict()["pos_embed"], encoders["student"].state_dict()["pos_embed"])


def test_an_average_beside_a_teacher_is_missed(encoders: dict[str, nn.Module], save: Save) -> None:
    with pytest.raises(ValueError, match=r"only teacher and student; the teacher is an average itself\. Leave"):
        ssmpretrain.load_encoder(save(of_dino(**encoders)), ema=True)
    with pytest.raises(ValueError, match=r"has no averaged weights, only state_dict\. Leave `ema` out"):
        ssmpretrain.load_encoder(save(of_our_run(**encoders)), ema=True)


def test_an_export_says_whose_weights_it_holds(encoders: dict[str, nn.Module], save: Save, tmp_path: Path) -> None:
    path = save(of_our_run(**encoders))
    for teacher, role in ((None, "teacher"), (False, "student")):
        out = tmp_path / f"{role}.safetensors"
        ssmpretrain.save_encoder(ssmpretrain.load_encoder(path, teacher=teacher), out)
        with safetensors.safe_open(out, framework="pt") as file:
            assert json.loads(file.metadata()["ssmpretrain"])["origin"]["weights"] == role
        loaded = ssmpretrain.load_encoder(out)
        assert loaded.load_report.origin["weights"] == role
        assert torch.equal(loaded.state_dict()["norm_f.weight"], encoders[role].state_dict()["norm_f.weight"])
