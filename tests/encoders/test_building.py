"""Our encoders under timm's own builder."""

from pathlib import Path

import pytest
import timm
import torch

import ssmpretrain
from ssmpretrain.encoders.sequence.pos_embed import resize_pos_embed


@pytest.mark.parametrize(
    ("name", "class_token"), [("test_vim", "middle"), ("test_vim", "none"), ("test_arm", "middle")]
)
def test_timm_resizes_the_positions_of_an_export(name: str, class_token: str, tmp_path: Path) -> None:
    args = {"class_token": class_token} if name == "test_vim" else {}
    model = ssmpretrain.create_encoder(name, num_classes=3, img_size=(64, 96), **args)
    ssmpretrain.save_encoder(model, tmp_path / "out", "timm")
    word = f"local-dir:{tmp_path / 'out'}"
    wide = timm.create_model(word, pretrained=True, img_size=(96, 160))
    assert torch.equal(wide.pos_embed, resize_pos_embed(model.pos_embed, (4, 6), (6, 10), class_token))
    assert torch.equal(timm.create_model(word, pretrained=True).pos_embed, model.pos_embed)
    maps = timm.create_model(word, pretrained=True, img_size=128, in_chans=4, features_only=True)
    assert maps(torch.zeros(1, 4, 128, 128))[-1].shape == (1, 32, 8, 8)


def test_timm_refuses_weights_that_are_no_numbers(tmp_path: Path) -> None:
    model = ssmpretrain.create_encoder("test_vmamba", num_classes=3)
    ssmpretrain.save_encoder(model, tmp_path / "out", "timm")
    path = tmp_path / "out" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-4:] = b"\x00\x00\xc0\x7f"  # a NaN
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"timm: weights are finite .* test_vmamba 1 of"):
        timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)


@pytest.mark.parametrize("name", ["test_vim", "test_arm", "test_vmamba", "test_vmamba2"])
def test_features_are_named_by_modules_that_run(name: str) -> None:
    maps = timm.create_model(name, features_only=True, feature_cls="hook")(torch.zeros(1, 3, 64, 64))
    assert len(maps) == len(timm.create_model(name, features_only=True).feature_info.channels())


@pytest.mark.parametrize("create", [timm.create_model, ssmpretrain.create_encoder])
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("test_vim", {"dynamic_img_size": True, "output_stride": 16}, None),
        ("test_vim", {"stride": 8, "output_stride": 8}, None),
        ("test_vim", {"output_stride": 32}, "test_vim: the last features have a stride of 16 pixels.*output_stride=32"),
        ("test_arm", {"dynamic_img_pad": True}, "test_arm: images are not padded; got dynamic_img_pad=True"),
        ("test_vmamba", {"output_stride": 32, "dynamic_img_size": False}, None),
        ("test_vmamba", {"output_stride": 8}, "test_vmamba: the last features have a stride of 32 pixels"),
        ("test_vmamba", {"img_size": 64}, "any size"),
        (
            "test_vim",
            {"features_only": True, "feature_cls": "list"},
            "feature_cls is one of getter, hook, fx, pyramid; got 'list'",
        ),
        ("test_vim", {"features_only": True, "feature_cls": "hook", "bidirectional": "layer"}, "blocks work in pairs"),
    ],
)
def test_timms_arguments_are_taken_or_refused_in_words(create, name: str, options: dict, message: str | None) -> None:
    if message is None:
        create(name, num_classes=0, **options)
        return
    with pytest.raises(ValueError, match=message):
        create(name, num_classes=0, **options)
