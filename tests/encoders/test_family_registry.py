"""Visible patches alone are pooled as whole images are."""

from typing import Any

import pytest
import torch

import ssmpretrain
from ssmpretrain.encoders.family_registry import family_of


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("test_vim", {}),
        ("test_vim", {"class_token": "head"}),
        ("test_vim", {"class_token": "double"}),
        ("test_vim", {"class_token": "none"}),
        ("test_vim", {"global_pool": "avg"}),
        ("test_vim", {"global_pool": "max"}),
        ("test_vmamba", {}),
        ("test_vmamba", {"global_pool": "max"}),
        ("test_vit", {}),
        ("test_vit", {"global_pool": "avg"}),
        ("test_vit", {"global_pool": "map"}),
        ("deit_tiny_distilled_patch16_224", {"depth": 1, "img_size": 64}),
    ],
)
def test_with_nothing_hidden_it_is_what_the_encoder_gives(name: str, args: dict[str, Any]) -> None:
    torch.manual_seed(0)
    encoder: Any = ssmpretrain.create_encoder(name, num_classes=0, **args).eval()
    family = family_of(encoder)
    side = family.patch_side(encoder)
    images = torch.randn(2, 3, *(encoder.patch_embed.img_size if hasattr(encoder, "set_input_size") else (64, 64)))
    assert side is not None
    count = images.shape[2] // side * (images.shape[3] // side)
    everything, some = torch.arange(count).expand(2, -1), torch.arange(0, count, 2).expand(2, -1)
    with torch.no_grad():
        whole, part = encoder(images), family.pool_visible(encoder, images, some)
        assert (family.pool_visible(encoder, images, everything) - whole).norm() < 2e-6 * whole.norm()
    assert part.shape == whole.shape and not torch.allclose(part, whole, rtol=1e-3)
