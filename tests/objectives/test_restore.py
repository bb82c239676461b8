"""Damaged, incomplete or malicious checkpoints and folders of open_clip: each gives a message of one sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from clip_run import tiny_clip

from ssmpretrain.commands.shared.two_towers import load_towers
from ssmpretrain.objectives.contrastive.open_clip_export import save_open_clip
from ssmpretrain.objectives.contrastive.text_weights import OPEN_CLIP_CONFIG
from ssmpretrain.objectives.masked.mae import MAE
from ssmpretrain.objectives.restore import load_contrastive, load_objective

Change = Callable[[dict[str, Any]], object]


def put(*keys: str, value: Any = None) -> Change:
    """Set an entry of nested dictionaries; None removes it."""

    def change(content: dict[str, Any]) -> None:
        for key in keys[:-1]:
            content = content[key]
        content.pop(keys[-1], None)
        if value is not None:
            content[keys[-1]] = value

    return change


def checkpoint(model: Any) -> dict[str, Any]:
    content = {"state_dict": model.state_dict(), "hyper_parameters": json.loads(json.dumps(dict(model.hparams)))}
    model.on_save_checkpoint(content)
    return content


@pytest.fixture(scope="module")
def mae() -> dict[str, Any]:
    return checkpoint(MAE("test_vim", {"embed_dim": 32, "depth": 2}, decoder_embed_dim=32))


@pytest.fixture(scope="module")
def clip() -> dict[str, Any]:
    images = {"size": [32, 32], "mean": [0.5] * 3, "std": [0.3] * 3, "interpolation": "bicubic", "crop_pct": 1.0}
    model = tiny_clip(encoder_args={"patch_size": 8, "img_size": 32, "embed_dim": 32, "depth": 2})
    return checkpoint(model) | {"images": images}


UNSAID = "and how it was built, and so it cannot be built ("


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (put("hyper_parameters"), "says how its {} was built, under hyper_parameters; got something else"),
        (put("hyper_parameters", value=[1]), "says how its {} was built, under hyper_parameters; got something else"),
        (put("hyper_parameters", "encoder_args"), "under hyper_parameters; got something else (KeyError"),
        (put("hyper_parameters", "optimizer", value={"bygone": 1}), "under hyper_parameters; got something else"),
        (put("hyper_parameters", "encoder_args", "depth", value=10**9), "depth is at most the number of tensors in"),
        (put("hyper_parameters", "bygone", value=1), f"says that it is of {{}} {UNSAID}TypeError"),
        (put("hyper_parameters", "encoder_args", "embed_dim", value="wide"), UNSAID),
        (put("state_dict"), "holds no weights"),
        (put("state_dict", value=3), "holds no weights"),
    ],
)
def test_an_objective_that_a_checkpoint_does_not_describe(
    change: Change, expected: str, mae: dict[str, Any], clip: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "x.ckpt"
    loaders: tuple[tuple[dict[str, Any], Callable[[Path], Any]], ...] = (
        (mae, load_objective),
        (clip, load_contrastive),
    )
    for content, load in loaders:
        copied = dict(content)
        copied["hyper_parameters"] = json.loads(json.dumps(content["hyper_parameters"]))
        change(copied)
        torch.save(copied, path)
        with pytest.raises(ValueError) as caught:
            load(path)
        assert expected.format(content["objective"]) in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("objective", "keys"), [("mae", ["decoder_depth"]), ("clip", ["text", "layers"]), ("clip", ["text", "width"])]
)
def test_a_header_allocates_nothing(
    objective: str, keys: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    content = dict(request.getfixturevalue(objective))
    content["hyper_parameters"] = json.loads(json.dumps(content["hyper_parameters"]))
    put(*keys, value=10**9 - 10**9 % 4)(content["hyper_parameters"])
    torch.save(content, tmp_path / "x.ckpt")
    load: Callable[[Path], Any] = load_objective if objective == "mae" else load_contrastive
    with pytest.raises(ValueError, match=rf"{keys[-1]} is at most ") as refused:
        load(tmp_path / "x.ckpt")
    assert "x.ckpt says" in str(refused.value)


@pytest.fixture(scope="module")
def exported(clip: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    torch.save(clip, folder / "last.ckpt")
    save_open_clip(load_contrastive(folder / "last.ckpt"), folder / "clip")
    return folder / "clip"


WEIGHTS = "open_clip_model.safetensors"


def config(*keys: str, value: Any = None) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        content = json.loads((folder / OPEN_CLIP_CONFIG).read_text())
        put(*keys, value=value)(content)
        (folder / OPEN_CLIP_CONFIG).write_text(json.dumps(content))

    return change


def written(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def torn(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:5000])


VISION, TEXT = ("model_cfg", "vision_cfg"), ("model_cfg", "text_cfg")
SPELLED = "ssmpretrain_encoder.name=test_vim&depth="


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: (folder / WEIGHTS).unlink(), "has a configuration and no weights"),
        (lambda folder: (folder / OPEN_CLIP_CONFIG).unlink(), f"open_clip's weights need {OPEN_CLIP_CONFIG}"),
        (written(WEIGHTS, b""), "is damaged or no safetensors file"),
        (torn, "is damaged or no safetensors file"),
        (lambda folder: safetensors.torch.save_file({"a": torch.ones(1)}, folder / WEIGHTS), "layers is at most "),
        (written(OPEN_CLIP_CONFIG, b""), "is no configuration of open_clip"),
        (written(OPEN_CLIP_CONFIG, b"\xff\x00"), "is no configuration of open_clip"),
        (written(OPEN_CLIP_CONFIG, b"[1]"), "is no configuration of open_clip"),
        (written(OPEN_CLIP_CONFIG, b"[" * 100_000), "is no configuration of open_clip"),
        (config("model_cfg"), "is no configuration of open_clip"),
        (config(*VISION), "cannot be loaded (KeyError: 'vision_cfg')"),
        (config(*TEXT, value=[1]), "is no configuration of open_clip"),
        (config("preprocess_cfg", value=[1]), "is no configuration of open_clip"),
        (config("preprocess_cfg", "mean", value=3), "entry images.mean of"),
        (config("preprocess_cfg", "size", value="x"), "entry images.size of"),
        (config(*VISION, "timm_model_name", value="hf-hub:someone/x"), "names a model that timm has; got 'hf-hub:"),
        (config(*VISION, "timm_model_name", value="local-dir:/x"), "names a model that timm has; got 'local-dir:"),
        (config(*VISION, "timm_model_name", value=7), "names a model that timm has; got 7"),
        (config(*VISION, "timm_model_name", value="nothing"), "cannot be loaded (RuntimeError: Unknown model"),
        (config(*VISION, "timm_model_name", value=f"{SPELLED}1000000000"), "depth is at most the number of tensors"),
        (
            config(*VISION, "timm_model_name", value=f"{SPELLED}deep"),
            "the value of depth in the name is JSON; got deep",
        ),
        (config(*TEXT, "layers", value=10**9), "layers is at most the number of tensors"),
        (config(*TEXT, "width", value=60_000), "says that its model is open_clip's, of "),
        (config(*TEXT, "heads", value="x"), "cannot be loaded (TypeError"),
        (config(*TEXT, "context_length", value="x"), "context_length is at least 3 tokens"),
        (config("model_cfg", "bygone", value=1), "cannot be loaded (TypeError"),
    ],
)
def test_a_folder_of_open_clips_that_is_incomplete_or_damaged(
    damage: Callable[[Path], object], expected: str, exported: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(exported, folder)
    damage(folder)
    args = {"checkpoint": str(folder), "device": "cpu", "precision": "32", "ema": None, "image_size": None}
    with pytest.raises(ValueError) as caught:
        load_towers(type("Args", (), args), where="zeroshot")  # type: ignore[arg-type]
    assert expected in str(caught.value) and "clip" in str(caught.value)


def test_a_text_tower_is_not_taken_from_tensors_of_other_shapes(tmp_path: Path, clip: dict[str, Any]) -> None:
    state = {**clip["state_dict"], "text.token_embedding.weight": torch.ones(3)}
    torch.save({"state_dict": state}, tmp_path / "x.pt")
    with pytest.raises(
        ValueError, match=r"TextTower: init_from holds CLIP's Transformer or ours; .*x.pt has something"
    ):
        tiny_clip(text={"init_from": str(tmp_path / "x.pt")})
