from pathlib import Path

import pytest
import timm
import torch
from timm.data import resolve_model_data_config

import ssmpretrain

IMAGES = {
    "size": [64, 96],
    "mean": [0.1, 0.2, 0.3],
    "std": [0.4, 0.5, 0.6],
    "interpolation": "bilinear",
    "crop_pct": 1.0,
}
ANSWER = {
    "input_size": (3, 64, 96), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear",
    "crop_pct": 1.0, "crop_mode": "center",
}  # fmt: skip
ENCODERS = {
    "test_vim": {"img_size": [64, 96]},
    "test_vmamba": {},
    "test_vmamba2": {},
    "test_vit": {"img_size": [64, 96]},
    "test_mambaout": {},
}


def run_checkpoint(path: Path, name: str, args: dict, images: dict) -> Path:
    state = ssmpretrain.create_encoder(name, num_classes=0, **args).state_dict()
    state = {f"encoder.{key}": tensor for key, tensor in state.items()}
    torch.save({"state_dict": state, "encoder": {"name": name, "args": args}, "images": images}, path)
    return path


@pytest.mark.parametrize("name", ENCODERS)
def test_what_a_run_says_of_its_images_is_what_timm_answers_through_all_formats(tmp_path, name):
    path = run_checkpoint(tmp_path / "last.ckpt", name, ENCODERS[name], IMAGES)
    formats = ["safetensors", "timm"] + ["official"] * (name in ("test_vim", "test_vmamba"))
    for step, format in enumerate(["", *formats, "safetensors"]):
        if format:
            suffix = {"safetensors": ".safetensors", "timm": "", "official": ".pth"}[format]
            path = ssmpretrain.save_encoder(ssmpretrain.load_encoder(path), tmp_path / f"{step}{suffix}", format).path
        assert resolve_model_data_config(ssmpretrain.load_encoder(path)) == ANSWER
        wrapped = ssmpretrain.load_encoder(path, features_only=True, out_indices=[0])
        assert resolve_model_data_config(wrapped) == ANSWER
        if format == "timm":
            from_json = resolve_model_data_config(timm.create_model(f"local-dir:{path}", pretrained=True))
            assert {**from_json, "mean": tuple(from_json["mean"]), "std": tuple(from_json["std"])} == ANSWER


def test_an_older_run_keeps_the_names_interpolation_and_crop(tmp_path):
    images = {key: IMAGES[key] for key in ("size", "mean", "std")}
    path = run_checkpoint(tmp_path / "last.ckpt", "test_vmamba", {}, images)
    answer = resolve_model_data_config(ssmpretrain.load_encoder(path))
    assert answer == {**ANSWER, "interpolation": "bicubic", "crop_pct": 0.875}


def test_a_published_file_keeps_the_names_at_the_size_asked_for(tmp_path):
    model = ssmpretrain.create_encoder("test_vim")
    torch.save({"model": model.state_dict()}, tmp_path / "published.pth")
    registered = resolve_model_data_config(model)
    assert resolve_model_data_config(ssmpretrain.load_encoder(tmp_path / "published.pth")) == registered
    larger = ssmpretrain.load_encoder(tmp_path / "published.pth", img_size=(96, 128))
    assert resolve_model_data_config(larger) == {**registered, "input_size": (3, 96, 128)}


def test_timms_own_recommendation_for_its_weights_does_not_outlive_a_run(tmp_path):
    fresh = ssmpretrain.create_encoder("mambaout_femto")
    assert resolve_model_data_config(fresh, use_test_size=True)["input_size"] == (3, 288, 288)
    path = run_checkpoint(tmp_path / "last.ckpt", "mambaout_femto", {}, IMAGES)
    assert resolve_model_data_config(ssmpretrain.load_encoder(path), use_test_size=True) == ANSWER


def test_other_encoders_of_the_same_name_are_untouched(tmp_path):
    before = resolve_model_data_config(ssmpretrain.create_encoder("test_vmamba"))
    ssmpretrain.load_encoder(run_checkpoint(tmp_path / "last.ckpt", "test_vmamba", {}, IMAGES))
    assert resolve_model_data_config(ssmpretrain.create_encoder("test_vmamba")) == before
