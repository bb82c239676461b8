"""Vectors of images, from one pass."""

import pytest
import torch

from ssmpretrain.encoders import create_encoder
from ssmpretrain.encoders.features.maps import last_map
from ssmpretrain.encoders.features.pooled import POOLINGS, Pooled, pooled_features

IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def encoder(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    sized = {} if name in ("test_vmamba", "test_mambaout") else {"img_size": (64, 96)}
    return create_encoder(name, num_classes=0, **sized).eval()


@pytest.mark.parametrize("name", ["test_vim", "test_vmamba", "test_mambaout", "test_vit"])
def test_default_is_the_mean_of_the_last_map(name: str) -> None:
    model = encoder(name)
    with torch.no_grad():
        vector = pooled_features(model, IMAGES, [Pooled()])[Pooled()]
        assert torch.equal(vector, last_map(model, IMAGES).mean(dim=(2, 3)))


@pytest.mark.parametrize("name", ["test_vim", "test_vit"])
def test_every_kind_is_what_its_name_says(name: str) -> None:
    model = encoder(name)
    kinds = [Pooled(pooling, last) for pooling in POOLINGS if pooling != "normed" for last in (1, 2)]
    with torch.no_grad():
        vectors = pooled_features(model, IMAGES, kinds)
        maps = model.forward_intermediates(
            IMAGES, indices=2, norm=True, return_prefix_tokens=True, intermediates_only=True
        )
    (first, first_token), (last, last_token) = maps
    assert torch.equal(vectors[Pooled("class", 1)], last_token[:, 0])
    assert torch.equal(vectors[Pooled("middle", 1)], last[:, :, last.shape[2] // 2, last.shape[3] // 2])
    assert torch.equal(vectors[Pooled("mean", 2)], torch.cat([first.mean((2, 3)), last.mean((2, 3))], dim=1))
    both = [first_token[:, 0], first.mean((2, 3)), last_token[:, 0], last.mean((2, 3))]
    assert torch.equal(vectors[Pooled("both", 2)], torch.cat(both, dim=1))


def test_register_tokens_of_timm_are_no_class_token() -> None:
    model = create_encoder("test_vit", img_size=(64, 96), num_classes=0, reg_tokens=3).eval()
    with torch.no_grad():
        vector = pooled_features(model, IMAGES, [Pooled("class")])[Pooled("class")]
        assert torch.equal(vector, model.forward_features(IMAGES)[:, 0])


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("test_vmamba", Pooled("class"), "VMamba has no class token to read. Use the poolings mean and middle."),
        ("test_vim", Pooled("normed"), "Vim has no norm of pooled features, .* Use the pooling mean."),
        ("test_vim", Pooled("mean", 99), "last_blocks is between 1 and the 4 of Vim; got 99."),
        ("test_vim", Pooled("mean", 0), "last_blocks is between 1 and the 4 of Vim; got 0."),
    ],
)
def test_what_an_encoder_lacks_is_named(name: str, kind: Pooled, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pooled_features(encoder(name), IMAGES, [kind])
