"""Vector and map of images in one pass, for every family."""

from typing import Any

import pytest
import torch
from torch import nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders import create_encoder, family_of
from ssmpretrain.encoders.features.encoded import check_view_size, encode, freeze_unread, global_kind
from ssmpretrain.encoders.features.pooled import Pooled, pooled_features

SWIN = {"img_size": 64, "embed_dim": 16, "depths": [1, 1, 2, 2], "num_heads": [1, 2, 4, 8]}
# encoder, its arguments, kind of its vector, whether an encoder without a head gives the same vector
ENCODERS: list[tuple[str, dict[str, Any], str, bool]] = [
    ("test_vim", {}, "class", True),
    ("test_vim", {"class_token": "head"}, "class", True),
    ("test_vim", {"class_token": "double"}, "class", True),
    ("test_vim", {"class_token": "none"}, "mean", True),
    ("test_vim", {"global_pool": "avg"}, "mean", True),
    ("test_vmamba", {}, "mean", True),
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
    for size in (64, 96):  # 96: other sizes than the encoder was built for
        images = torch.randn(2, 3, size, size)
        with torch.no_grad():
            vector, patches = encode(encoder, images)
            own = encoder(images)
            assert torch.equal(pooled_features(encoder, images, [Pooled(kind)])[Pooled(kind)], vector)
        stride = encoder.feature_info[-1]["reduction"]
        assert patches.shape == (2, encoder.num_features, size // stride, size // stride)
        assert vector.shape == (2, encoder.num_features)
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
