"""Vector and map of images in one pass, for every family."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import get_model_input_config
from torch import nn

from ssmpretrain import load_encoder, save_encoder
from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders import create_encoder, family_of
from ssmpretrain.encoders.features.encoded import (
    check_view_size,
    encode,
    encode_masked,
    freeze_unread,
    global_kind,
)
from ssmpretrain.encoders.features.pooled import Pooled, pooled_features, pooled_width
from ssmpretrain.encoders.masking.stem import masked_stem, require_stem

REGISTERS = {"class_token": "registers", "num_registers": 3}
CONCAT = {**REGISTERS, "global_pool": "concat", "register_reduction": 4}
SWIN = {"img_size": 64, "embed_dim": 16, "depths": [1, 1, 2, 2], "num_heads": [1, 2, 4, 8]}
# encoder, its arguments, kind of its vector, whether an encoder without a head gives the same vector
ENCODERS: list[tuple[str, dict[str, Any], str, bool]] = [
    ("test_vim", {}, "class", True),
    ("test_vim", {"class_token": "head"}, "class", True),
    ("test_vim", {"class_token": "double"}, "class", True),
    ("test_vim", {"class_token": "none"}, "mean", True),
    ("test_vim", {"global_pool": "avg"}, "mean", True),
    ("test_vim", REGISTERS, "class", True),
    ("test_vim", CONCAT, "class", False),
    ("test_vmamba", {}, "mean", True),
    ("test_vmamba2", {}, "mean", True),
    ("test_arm", {}, "mean", True),
    ("test_vit", {"reg_tokens": 3}, "class", True),
    ("test_vit", {"global_pool": "avg"}, "normed", True),
    ("test_vit", {"global_pool": "avg", "fc_norm": False}, "mean", True),
    ("test_vit", {"global_pool": "map", "class_token": False}, "mean", False),
    ("deit_tiny_distilled_patch16_224", {"embed_dim": 48, "depth": 2}, "class", False),
    ("swin_tiny_patch4_window7_224", SWIN, "mean", True),
    ("swinv2_tiny_window8_256", SWIN, "mean", True),
    ("test_convnext", {}, "normed", True),
    ("test_convnext", {"head_norm_first": True}, "mean", True),
    ("test_mambaout", {}, "normed", False),
    ("test_resnet", {}, "mean", True),
    ("test_efficientnet", {}, "mean", False),  # this and the next belong to no known family
    ("beit_base_patch16_224", {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 64}, "normed", True),
]
every_encoder = pytest.mark.parametrize(("name", "args", "kind", "is_own"), ENCODERS)


def built(name: str, args: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    encoder = create_encoder(name, num_classes=0, **args)
    family_of(encoder).accept_any_size(encoder)
    freeze_unread(encoder)
    return encoder


@every_encoder
def test_vector_is_the_feature_that_embed_computes_and_that_the_encoder_gives(
    name: str, args: dict[str, Any], kind: str, is_own: bool
) -> None:
    encoder = built(name, args).eval()
    assert global_kind(encoder) == Pooled(kind)
    for size in (64, 96) if name != "beit_base_patch16_224" else (64,):  # 96: another size than it was built for
        images = torch.randn(2, 3, size, size)
        with torch.no_grad():
            vector, patches = encode(encoder, images)
            own = encoder(images)
            assert torch.equal(pooled_features(encoder, images, [Pooled(kind)])[Pooled(kind)], vector)
        stride = encoder.feature_info[-1]["reduction"]
        width = pooled_width(encoder, Pooled(kind))
        assert patches.shape == (2, width, size // stride, size // stride)
        assert vector.shape == (2, width)
        assert (own.shape == vector.shape and torch.allclose(own, vector, atol=1e-5)) is is_own


@every_encoder
@pytest.mark.parametrize("with_map", [True, False])
def test_every_trained_parameter_gets_a_gradient(
    name: str, args: dict[str, Any], kind: str, is_own: bool, with_map: bool
) -> None:
    encoder = built(name, args)
    vector, patches = encode(encoder, torch.randn(2, 3, 64, 64))
    (vector.sum() + patches.sum() if with_map else vector.sum()).backward()
    lacking = [key for key, value in encoder.named_parameters() if value.requires_grad and value.grad is None]
    assert lacking == []


@pytest.mark.parametrize(
    ("name", "args", "frozen"),
    [
        ("test_mambaout", {}, {"head.pre_logits.fc.weight", "head.pre_logits.fc.bias"}),
        ("test_convnext", {}, set()),
        ("test_vit", {"global_pool": "avg"}, set()),
        ("test_vit", {"fc_norm": True}, {"fc_norm.weight", "fc_norm.bias"}),  # of the mean; the class token has `norm`
        ("test_vim", CONCAT, {"neck.weight", "norm_neck.weight"}),
        ("test_efficientnet", {}, {"conv_head.weight", "bn2.weight", "bn2.bias"}),
    ],
)
def test_only_what_is_not_read_is_frozen(name: str, args: dict[str, Any], frozen: set[str]) -> None:
    assert {key for key, value in built(name, args).named_parameters() if not value.requires_grad} == frozen


@every_encoder
def test_images_of_the_own_size_are_read_as_before_any_size_was_accepted(
    name: str, args: dict[str, Any], kind: str, is_own: bool
) -> None:
    torch.manual_seed(0)
    plain = create_encoder(name, num_classes=0, **args).eval()
    size = get_model_input_config(plain)["input_size"][-1]
    encoder = built(name, args).eval()
    assert {key: value.shape for key, value in encoder.state_dict().items()} == {
        key: value.shape for key, value in plain.state_dict().items()
    }
    images = torch.randn(1, 3, size, size)
    with torch.no_grad():
        assert all(torch.equal(*pair) for pair in zip(encode(encoder, images), encode(plain, images), strict=True))


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_a_swin_reads_a_crop_like_one_that_was_built_for_it(name: str) -> None:
    # Maps of 24, 12, 6 and 3 positions are whole windows of 3, and the last stage has no shifted windows.
    args = {**SWIN, "depths": [1, 2, 2, 1], "window_size": 3}
    large, small = (create_encoder(name, num_classes=0, **{**args, "img_size": size}).eval() for size in (192, 96))
    small.load_state_dict(large.state_dict())
    family_of(large).accept_any_size(large)
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        assert all(torch.equal(*pair) for pair in zip(encode(large, images), encode(small, images), strict=True))


@pytest.mark.parametrize(("name", "args"), [("test_vit", {"reg_tokens": 3}), ("swin_tiny_patch4_window7_224", SWIN)])
def test_an_exported_encoder_loads_in_plain_timm_and_here(name: str, args: dict[str, Any], tmp_path: Path) -> None:
    encoder = built(name, args).eval()
    size = get_model_input_config(encoder)["input_size"][-1]
    images = torch.randn(1, 3, size, size)
    save_encoder(encoder, tmp_path / "timm", "timm")
    plain = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True, num_classes=0).eval()
    loaded = load_encoder(tmp_path / "timm").eval()
    with torch.no_grad():
        own = encode(encoder, images).vector
        assert torch.equal(plain(images), own)
        assert torch.equal(loaded(images), own)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("test_vim", {}),
        ("test_vim", REGISTERS),
        ("test_vmamba", {}),
        ("test_vit", {}),
        ("swin_tiny_patch4_window7_224", SWIN),
        ("test_convnext", {"stem_type": "overlap_act"}),
        ("test_mambaout", {}),
    ],
)
def test_no_hidden_pixel_reaches_the_features(name: str, args: dict[str, Any]) -> None:
    encoder = built(name, args).eval()
    stem = require_stem("test", encoder, name)
    images, token = torch.randn(4, 3, 96, 96), torch.randn(1, 1, 1, stem.width)  # two views of two images
    side = 96 // stem.map_stride
    hidden = torch.rand(4, side, side) < 0.4
    hidden[:, 0, 0], hidden[:, 0, 1] = True, False
    spoilt = images.clone()
    spoilt[..., : stem.map_stride, : stem.map_stride] = torch.nan
    with torch.no_grad():
        first, second = (encode_masked(encoder, one, hidden, token) for one in (images, spoilt))
        assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
        shown = encode_masked(encoder, images, hidden.logical_not(), token)
        assert not torch.allclose(first.vector, shown.vector)


def test_blanking_stops_a_leak_through_an_overlapping_stem() -> None:
    encoder = built("test_vmamba", {}).eval()
    hidden = torch.zeros(1, 2, 2, dtype=torch.bool)
    hidden[:, 0, 0] = True
    images, token = torch.randn(1, 3, 64, 64), torch.zeros(1, 1, 1, 16)
    other = images.clone()
    other[..., :32, :32] += 1
    with torch.no_grad(), masked_stem(encoder, hidden, token):
        assert not torch.equal(encode(encoder, images).map, encode(encoder, other).map)


def test_the_token_is_in_place_before_positions_are_added() -> None:
    encoder = built("test_vim", {"img_size": 64, **REGISTERS})
    token = torch.randn(1, 1, 1, 32)
    with torch.no_grad(), masked_stem(encoder, torch.ones(1, 4, 4, dtype=torch.bool), token):
        torch.testing.assert_close(encoder.embed(torch.randn(1, 3, 64, 64)), token[0] + encoder.pos_embed)


@pytest.mark.parametrize(("side", "patches_before"), [(224, 98), (96, 18), (32, 2)])
def test_a_class_token_in_the_middle_has_half_of_the_patches_of_every_crop_before_it(
    side: int, patches_before: int
) -> None:
    encoder = built("test_vim", {})
    with torch.no_grad():
        encoder.patch_embed.proj.weight.zero_()
        encoder.pos_embed.zero_()
        tokens, _ = encoder.embed_all(torch.randn(1, 3, side, side))
        assert tokens.any(dim=2).nonzero()[:, 1].tolist() == [patches_before]
    assert tokens.shape[1] == 2 * patches_before + 1


def test_an_encoder_that_cannot_be_masked_is_refused() -> None:
    overlapping = create_encoder("test_vim", stride=8)
    with pytest.raises(UserError, match=r"DINO: test_vim: patches must not overlap, .* Set encoder_args.stride to 16."):
        require_stem("DINO", overlapping, "test_vim")
    with pytest.raises(UserError, match=r"DINO: .*'test_resnet' \(ResNet\) has none that is known. Choose Vim"):
        require_stem("DINO", create_encoder("test_resnet"), "test_resnet")


def test_an_encoder_without_the_interface_is_refused() -> None:
    with pytest.raises(UserError, match="Linear: one pass for vector and map needs timm's forward_intermediates"):
        freeze_unread(nn.Linear(3, 3))
    with pytest.raises(UserError, match=r"hiera_tiny_224: .* fails with 224 x 224 pixels \(normalization of features"):
        freeze_unread(create_encoder("hiera_tiny_224", stages=(1, 1, 1, 1)))


def test_the_example_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[3] / "docs" / "encoders.md").read_text()
    exec(page.split("```python\n")[1].split("```")[0], {})
    assert capsys.readouterr().out == "class_1\n"


def test_a_norm_of_pooled_features_normalises_the_mean_and_every_position() -> None:
    encoder = built("test_mambaout", {}).eval()
    nn.init.normal_(encoder.head.norm.weight)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        vector, patches = encode(encoder, images)
        last = encoder.forward_features(images)  # (B, h, w, D)
        assert torch.allclose(vector, encoder.head.norm(last.mean(dim=(1, 2))))
        assert torch.allclose(patches, encoder.head.norm(last).permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("name", "args", "good", "bad", "message"),
    [
        ("test_vim", {}, [16, 96, (224, 64)], 98, "multiples of 16 pixels, .* got 98. Use 96 or 112."),
        ("test_vim", {}, [], (96, 8), "got 8. Use 16."),
        ("test_vim", {"stride": 8}, [16, 24], 20, "multiples of 8 pixels, at least 16, .* got 20. Use 16 or 24."),
        ("test_vim", {"stride": 12, "img_size": 64}, [16, 28], 24, "16 pixels plus a multiple of 12, .* Use 16 or 28."),
        ("test_vit", {}, [96], 98, "test_vit: the sides of a view are multiples of 16 pixels"),
        ("test_vmamba", {}, [96, 224], 112, "multiples of 32 pixels, .* got 112. Use 96 or 128."),
        ("test_convnext", {}, [96], 98, "multiples of 32"),
        ("test_vit", {"patch_size": (16, 8)}, [98], None, ""),
        (
            "vit_tiny_r_s16_p8_224",
            {"depth": 1, "embed_dim": 48},
            [224],
            96,
            "reads images of 224 x 224 pixels only",
        ),
        ("beit_base_patch16_224", {"depth": 1, "embed_dim": 48, "num_heads": 3}, [224], 96, "Use views of 224, set"),
        ("test_resnet", {}, [98], None, ""),
    ],
)
def test_a_size_that_the_patches_do_not_cover_is_named_with_its_neighbours(
    name: str, args: dict[str, Any], good: list[Any], bad: Any, message: str
) -> None:
    encoder = create_encoder(name, num_classes=0, **args)
    for size in good:
        check_view_size(encoder, size)
    if bad is not None:
        with pytest.raises(UserError, match=message):
            check_view_size(encoder, bad)
