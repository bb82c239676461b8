"""Maps at four strides from encoders of one."""

import pytest
import timm
import torch

import ssmpretrain
from ssmpretrain.encoders.features.maps import last_map
from ssmpretrain.encoders.timm_name import as_timm_name

SMALL = {"embed_dim": 32, "depth": 2}
WIDE = {"embed_dim": 192, "depth": 2}  # as vim_tiny


@pytest.mark.parametrize("name", ["vim_tiny_patch16_pyramid_224", "arm_base_patch16_pyramid_224"])
def test_features_of_a_pyramid_have_the_strides_of_a_convolutional_net(name: str) -> None:
    model = timm.create_model(name, features_only=True, **SMALL)
    assert model.feature_info.reduction() == [4, 8, 16, 32] and model.feature_info.channels() == [8, 16, 32, 32]
    images = torch.randn(2, 3, 64, 96)
    maps = model(images)
    assert [tuple(one.shape) for one in maps] == [(2, 8, 16, 24), (2, 16, 8, 12), (2, 32, 4, 6), (2, 32, 2, 3)]
    torch.testing.assert_close(maps[2], last_map(model.model, images))
    torch.testing.assert_close(maps[3], torch.nn.functional.max_pool2d(maps[2], 2))
    sum(one.square().mean() for one in maps).backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    assert timm.create_model(name, **SMALL)(images).shape == (2, 1000)  # without features_only an encoder like others


def test_any_vim_has_a_pyramid_and_levels_can_be_chosen() -> None:
    model = timm.create_model(as_timm_name("test_vim", {"feature_cls": "pyramid", "stride": 8}), features_only=True)
    assert model.feature_info.reduction() == [2, 4, 8, 16]
    model = timm.create_model("test_vim", features_only=True, feature_cls="pyramid", out_indices=(1, -1))
    assert model.feature_info.reduction() == [8, 32] and len(model(torch.zeros(1, 3, 64, 64))) == 2
    assert not any(name.startswith("levels.0") for name in model.state_dict())
    with pytest.raises(ValueError, match=r"indices name some of 4 levels"):
        timm.create_model("test_vim", features_only=True, feature_cls="pyramid", out_indices=(4,))
    with pytest.raises(ValueError, match=r"a stride of 32 pixels, and no other; got output_stride=16"):
        timm.create_model("test_vim", features_only=True, feature_cls="pyramid", output_stride=16)
    with pytest.raises(ValueError, match=r"SimplePyramid: .*multiples of 4; got stride 14 and 32 channels"):
        timm.create_model("test_vim", features_only=True, feature_cls="pyramid", patch_size=14)
    with pytest.raises(ValueError, match=r"test_vmamba: feature_cls is one of getter, hook, fx; got 'pyramid'"):
        timm.create_model("test_vmamba", features_only=True, feature_cls="pyramid")


def test_a_pyramid_stands_on_the_weights_of_a_file(tmp_path) -> None:
    encoder = ssmpretrain.create_encoder("test_vim", num_classes=3)
    path = ssmpretrain.save_encoder(encoder, tmp_path / "vim.pth", "official").path
    folder = ssmpretrain.save_encoder(encoder, tmp_path / "vim", "timm").path
    images = torch.randn(1, 3, 64, 64)
    expected = last_map(encoder, images)
    options = {"features_only": True, "feature_cls": "pyramid"}
    for model in (
        ssmpretrain.load_encoder(path, **options),
        timm.create_model(f"local-dir:{folder}", pretrained=True, **options),
    ):
        torch.testing.assert_close(model(images)[2], expected)
    torch.save(ssmpretrain.create_encoder("test_vim", num_classes=0, img_size=64, **WIDE).state_dict(), path)
    model = ssmpretrain.load_encoder(path, name="vim_tiny_patch16_pyramid_224", depth=2, features_only=True)
    assert model.feature_info.reduction() == [4, 8, 16, 32] and model.model.patch_embed.grid_size == (4, 4)
