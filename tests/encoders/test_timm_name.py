"""Encoders with arguments as one word that timm builds."""

from typing import Any

import pytest
import timm
import torch

from ssmpretrain.encoders import create_encoder, list_encoders
from ssmpretrain.encoders.timm_name import as_timm_name


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("test_vim", {}),
        ("test_vim", {"patch_size": 8, "img_size": [64, 48], "class_token": "head", "expand": 1.5}),
        ("test_vim", {"divide_output": False, "pos_embed": "sincos"}),
        ("test_vmamba", {"drop_path_rate": 0.1}),
        ("test_vit", {"img_size": [96, 96], "global_pool": "avg"}),
    ],
)
def test_timm_builds_what_was_spelled(name: str, args: dict[str, Any]) -> None:
    built, wanted = (
        timm.create_model(as_timm_name(name, args), num_classes=5),
        create_encoder(name, num_classes=5, **args),
    )
    assert type(built) is type(wanted) and str(built) == str(wanted)
    assert {key: tensor.shape for key, tensor in built.state_dict().items()} == {
        key: tensor.shape for key, tensor in wanted.state_dict().items()
    }
    assert built.pretrained_cfg["architecture"] == name
    assert timm.models.get_model_args(built) == timm.models.get_model_args(wanted)
    built.load_state_dict(wanted.state_dict())
    channels, *size = timm.models.get_model_input_config(wanted)["input_size"]
    image = torch.randn(1, channels, *size)
    assert torch.equal(built.eval()(image), wanted.eval()(image))


def test_an_encoder_without_arguments_keeps_its_name_and_one_with_any_value_gets_through() -> None:
    assert as_timm_name("test_vim", {}) == "test_vim"
    assert as_timm_name("test_vim", {"img_size": [64, 48]}) == "ssmpretrain_encoder.name=test_vim&img_size=[64,48]"
    odd = as_timm_name("test_vim", {"odd": "a/b:c\\d.e&f=g %é+"})
    assert not set(odd) & set("/:\\ ")


def test_the_word_alone_is_refused_and_is_none_of_our_encoders() -> None:
    with pytest.raises(ValueError, match="contains an encoder and its arguments"):
        timm.create_model("ssmpretrain_encoder")
    with pytest.raises(ValueError, match="Did you mean 'patch_size'"):
        timm.create_model(as_timm_name("test_vim", {"patchsize": 8}))
    assert "ssmpretrain_encoder" not in list_encoders()
