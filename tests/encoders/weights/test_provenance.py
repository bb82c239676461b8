import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

import ssmpretrain

DATA = {"class": "Digits", "train": "digits", "samples": 8000}
SUFFIXES = {"safetensors": ".safetensors", "timm": "", "official": ".pth"}


def run_checkpoint(path: Path, averaged: bool = False, **more) -> torch.nn.Module:
    """What a run of MAE leaves, and the encoder in it."""
    torch.manual_seed(0)
    model = ssmpretrain.create_encoder("test_vim", num_classes=0, img_size=64)
    state = {f"encoder.{name}": tensor for name, tensor in model.state_dict().items()}
    content = {
        "state_dict": state | {"decoder.mask_token": torch.zeros(1)},
        "encoder": {"name": "test_vim", "args": {"img_size": [64, 64]}},
        "objective": "MAE", "epoch": 11, "global_step": 3000, "data": DATA, **more,
    }  # fmt: skip
    if averaged:
        content["current_model_state"] = {name: tensor + 1 for name, tensor in state.items()}
    torch.save(content, path)
    return model


def description(path: Path, format: str) -> dict:
    """What an export says about itself, read without this package."""
    if format == "timm":
        return json.loads((path / "config.json").read_text())["ssmpretrain"]
    if format == "official":
        return torch.load(path, weights_only=True)["ssmpretrain"]
    with safetensors.safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["ssmpretrain"])


def stranger_sha256(path: Path) -> str:
    """The sum as the docstring defines it, from numpy's view of a safetensors file."""
    digest = hashlib.sha256()
    with safetensors.safe_open(path, framework="np") as file:
        for name in sorted(file.keys()):
            values = file.get_tensor(name)
            shape = ",".join(str(side) for side in values.shape)
            digest.update(name.encode() + b"\0" + values.dtype.name.encode() + b"\0" + shape.encode() + b"\0")
            digest.update(np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("format", SUFFIXES)
def test_every_format_says_what_it_holds_and_where_it_comes_from(tmp_path, format):
    run_checkpoint(tmp_path / "last.ckpt")
    model = ssmpretrain.load_encoder(tmp_path / "last.ckpt")
    saved = ssmpretrain.save_encoder(model, tmp_path / f"out{SUFFIXES[format]}", format)
    said = description(saved.path, format)
    assert said["encoder"]["name"] == "test_vim"
    assert said["encoder"]["args"]["img_size"] == [64, 64]
    assert said["origin"] == {
        "file": "last.ckpt", "entry": "state_dict", "weights": "raw",
        "objective": "MAE", "epoch": 11, "step": 3000, "data": DATA,
    }  # fmt: skip
    assert said["versions"] == {"ssmpretrain": ssmpretrain.__version__, "torch": torch.__version__}
    report = ssmpretrain.load_encoder(saved.path).load_report
    assert report.origin == said["origin"]
    assert str(report).endswith("; sha256 verified; MAE, epoch 11, step 3000, unaveraged weights")


def test_the_sha256_is_what_a_stranger_computes_and_lies_beside_the_file(tmp_path):
    torch.save(ssmpretrain.create_encoder("test_vim").half().state_dict(), tmp_path / "half.pth")
    for name, options in {"half": {"keep_dtypes": True}, "single": {}}.items():
        model = ssmpretrain.load_encoder(tmp_path / "half.pth", **options)
        saved = ssmpretrain.save_encoder(model, tmp_path / f"{name}.safetensors")
        beside = json.loads((tmp_path / f"{name}.json").read_text())
        assert beside == description(saved.path, "safetensors")
        assert beside["sha256"] == stranger_sha256(saved.path)


@pytest.mark.parametrize(("ema", "kind"), [(None, "ema"), (True, "ema"), (False, "raw")])
def test_averaged_weights_are_told_from_unaveraged_ones(tmp_path, ema, kind):
    run_checkpoint(tmp_path / "last.ckpt", averaged=True)
    report = ssmpretrain.load_encoder(tmp_path / "last.ckpt", ema=ema).load_report
    assert report.origin["weights"] == kind
    assert str(report).endswith("unaveraged weights") == (kind == "raw")


def test_the_origin_survives_all_conversions(tmp_path):
    run_checkpoint(tmp_path / "last.ckpt")
    first = ssmpretrain.load_encoder(tmp_path / "last.ckpt")
    path = tmp_path / "last.ckpt"
    for step, (format, suffix) in enumerate([*SUFFIXES.items(), *SUFFIXES.items()]):
        path = ssmpretrain.save_encoder(ssmpretrain.load_encoder(path), tmp_path / f"{step}{suffix}", format).path
    last = ssmpretrain.load_encoder(path)
    assert last.load_report.origin == first.load_report.origin
    assert (
        description(path, "timm" if path.is_dir() else "official")["sha256"]
        == description(tmp_path / "0.safetensors", "safetensors")["sha256"]
    )


def test_an_older_or_foreign_file_says_less(tmp_path):
    model = run_checkpoint(tmp_path / "last.ckpt")
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    torch.save({key: content[key] for key in ("state_dict", "encoder")}, tmp_path / "older.ckpt")
    assert ssmpretrain.load_encoder(tmp_path / "older.ckpt").load_report.origin == {
        "file": "older.ckpt", "entry": "state_dict", "weights": "raw",
    }  # fmt: skip
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    report = ssmpretrain.load_encoder(tmp_path / "bare.pth").load_report
    assert report.origin == {"file": "bare.pth", "entry": "the file itself"}
    assert "sha256" not in str(report)
    saved = ssmpretrain.save_encoder(model, tmp_path / "fresh.safetensors")  # never loaded
    assert description(saved.path, "safetensors")["origin"] == {}


def tampered(path: Path, format: str) -> None:
    """Change one number of an export and nothing that it says."""
    if format == "official":
        content = torch.load(path, weights_only=True)
        content["model"]["norm_f.weight"][3] += 1e-3
        torch.save(content, path)
        return
    path = path / "model.safetensors" if format == "timm" else path
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    state = safetensors.torch.load_file(path)
    state["norm_f.weight"][3] += 1e-3
    safetensors.torch.save_file(state, path, metadata)


@pytest.mark.parametrize("format", SUFFIXES)
def test_tensors_that_are_not_those_written_are_refused(tmp_path, format):
    saved = ssmpretrain.save_encoder(ssmpretrain.create_encoder("test_vim"), tmp_path / f"a{SUFFIXES[format]}", format)
    tampered(saved.path, format)
    with pytest.raises(ValueError, match=r"are not those that were written: their sha256 is .* Export it again, or"):
        ssmpretrain.load_encoder(saved.path)


def test_a_description_in_the_way_is_not_overwritten(tmp_path):
    (tmp_path / "a.json").write_text("precious")
    with pytest.raises(ValueError, match=r"a\.json, the description beside a\.safetensors, exists"):
        ssmpretrain.save_encoder(ssmpretrain.create_encoder("test_vim"), tmp_path / "a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
