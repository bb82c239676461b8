"""Mask tokens in place of a stem's output, for every encoder whose stem is known."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from ssmpretrain.encoders import create_encoder
from ssmpretrain.encoders.masking.stem import masked_stem, stem_of

TINY_SWIN = {"img_size": 64, "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]}
# encoder, its arguments, stem's map of a 64 x 64 image, pixels along a position of the last map
STEMS = [
    ("test_vim", {"img_size": 64}, "NLC", (2, 16, 32), 16),
    ("test_vmamba", {}, "NHWC", (2, 16, 16, 16), 32),
    ("test_vmamba", {"depths": [1, 1]}, "NHWC", (2, 16, 16, 16), 8),
    ("test_mambaout", {}, "NHWC", (2, 16, 16, 16), 32),
    ("test_convnext", {}, "NCHW", (2, 24, 16, 16), 32),
    ("test_convnext", {"patch_size": 2}, "NCHW", (2, 24, 32, 32), 32),
    ("test_convnext", {"stem_type": "overlap_act"}, "NCHW", (2, 24, 16, 16), 32),
    ("test_vit", {"img_size": 64, "dynamic_img_size": False}, "NLC", (2, 16, 64), 16),
    ("test_vit", {"dynamic_img_size": True}, "NHWC", (2, 4, 4, 64), 16),
    ("swin_tiny_patch4_window7_224", TINY_SWIN, "NHWC", (2, 16, 16, 16), 32),
    ("swinv2_tiny_window8_256", TINY_SWIN, "NHWC", (2, 16, 16, 16), 32),
]
every_stem = pytest.mark.parametrize(("name", "args", "layout", "shape", "stride"), STEMS)


def channels_last(output: Tensor, layout: str) -> Tensor:
    """A stem's output as (B, H, W, C)."""
    if layout == "NLC":
        side = round(output.shape[1] ** 0.5)
        return output.unflatten(1, (side, side))
    return output.permute(0, 2, 3, 1) if layout == "NCHW" else output


def masked(name: str, args: dict[str, Any]) -> tuple[Any, Tensor, Tensor]:
    """An encoder, a mask with one hidden position an image, and a token."""
    torch.manual_seed(0)
    encoder = create_encoder(name, num_classes=0, **args)
    stem = stem_of(encoder)
    assert stem is not None
    side = 64 // stem.map_stride
    hidden = torch.zeros(2, side, side, dtype=torch.bool)
    hidden[0, 0, 1] = hidden[1, side - 1, 0] = True
    return encoder, hidden, torch.randn(1, 1, 1, stem.width)


@every_stem
def test_token_stands_at_hidden_positions_and_the_stem_elsewhere(
    name: str, args: dict[str, Any], layout: str, shape: tuple[int, ...], stride: int
) -> None:
    encoder, hidden, token = masked(name, args)
    picture = torch.randn(2, 3, 64, 64)
    module = encoder.stem if hasattr(encoder, "stem") else encoder.patch_embed
    own = module(picture)
    with masked_stem(encoder, hidden, token):
        output = module(picture)
    assert output.shape == own.shape == shape and stem_of(encoder).map_stride == stride  # type: ignore[union-attr]
    output, own = channels_last(output, layout), channels_last(own, layout)
    side = output.shape[1] // hidden.shape[1]
    for image, (row, column) in enumerate([(0, 1), (hidden.shape[1] - 1, 0)]):
        square = (image, slice(row * side, (row + 1) * side), slice(column * side, (column + 1) * side))
        assert torch.equal(output[square], token[0].expand(side, side, -1))
        output[square] = own[square]
    assert torch.equal(output, own)


@pytest.mark.parametrize("name", ["test_vmamba", "test_mambaout", "test_vim"])
def test_token_takes_the_dtype_of_the_stem_under_autocast(name: str) -> None:
    encoder, hidden, token = masked(name, {"img_size": 64} if name == "test_vim" else {})
    module = encoder.stem if hasattr(encoder, "stem") else encoder.patch_embed
    with torch.autocast("cpu", torch.bfloat16):
        own = module(torch.randn(2, 3, 64, 64))
        with masked_stem(encoder, hidden, token):
            assert module(torch.randn(2, 3, 64, 64)).dtype == own.dtype


def test_stem_is_left_as_it_was_even_after_an_error() -> None:
    encoder, hidden, token = masked("test_vmamba", {})
    picture = torch.randn(2, 3, 64, 64)
    own = encoder.patch_embed(picture)
    with pytest.raises(RuntimeError, match="in the middle"), masked_stem(encoder, hidden, token):
        raise RuntimeError("in the middle")
    assert torch.equal(encoder.patch_embed(picture), own) and not encoder.patch_embed._forward_hooks


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("test_resnet", {}),
        ("test_mambaout", {"features_only": True}),
        ("vit_tiny_r_s16_p8_224", {"depth": 1}),  # patches of a ResNet's map
        ("test_vit", {"img_size": 64, "patch_size": (8, 16)}),
    ],
)
def test_other_stems_are_not_known(name: str, args: dict[str, Any]) -> None:
    assert stem_of(timm.create_model(name, **args)) is None


def test_overlapping_patches_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must not overlap.*16 and stride 8\. Set encoder_args\.stride to 16"):
        stem_of(create_encoder("test_vim", stride=8))
