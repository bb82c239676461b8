"""Vectors of images, from one pass."""

from typing import Any

import pytest
import torch

from ssmpretrain.encoders import create_encoder
from ssmpretrain.encoders.features.maps import last_map
from ssmpretrain.encoders.features.pooled import (
    POOLINGS,
    Pooled,
    check_kinds,
    last_blocks,
    pool,
    pooled_features,
    pooled_width,
)

IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def encoder(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    sized = {} if name in ("test_vmamba", "test_vmamba2", "test_mambaout") else {"img_size": (64, 96)}
    return create_encoder(name, num_classes=0, **sized).eval()


@pytest.mark.parametrize("name", ["test_vim", "test_vmamba", "test_vmamba2", "test_mambaout", "test_vit"])
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
    of_dino = [first_token[:, 0], last_token[:, 0], last.mean((2, 3))]
    assert torch.equal(vectors[Pooled("class_mean", 2)], torch.cat(of_dino, dim=1))
    assert all(pooled_width(model, kind) == vector.shape[1] for kind, vector in vectors.items())


def test_outputs_of_the_mixers_are_read_at_the_class_token_and_normalised() -> None:
    model: Any = encoder("test_vim")
    kind = Pooled("class", 2)
    mixed: list[torch.Tensor] = []
    with torch.no_grad():
        vector = pool(model, last_blocks(model, IMAGES, [kind], "mixer"), [kind])[kind]
        stream, grid = model.embed_all(IMAGES)
        for block in model.layers:
            mixed.append(block.mixer(block.norm(stream)))
            stream = stream + mixed[-1]
        middle = grid[0] * grid[1] // 2
        expected = torch.cat([model.norm_f(one)[:, middle] for one in mixed[-2:]], dim=1)
        assert torch.allclose(vector, expected, atol=1e-5)
        assert not torch.allclose(vector, pooled_features(model, IMAGES, [kind])[kind], atol=1e-2)


def test_of_registers_the_mean_of_the_mixers_outputs_is_read() -> None:
    torch.manual_seed(0)
    model: Any = create_encoder("test_vim", num_classes=0, img_size=(64, 96), class_token="registers", num_registers=3)
    model.eval()
    outputs: list[torch.Tensor] = []
    for block in model.layers[-2:]:
        block.mixer.register_forward_hook(lambda module, args, output: outputs.append(output.clone()))
    kind = Pooled("class", 2)
    with torch.no_grad():
        vector = pool(model, last_blocks(model, IMAGES, [kind], "mixer"), [kind])[kind]
        places = [6, 13, 20]  # 24 patches, 24 // (3 + 1) before each register
        expected = torch.cat([model.norm_f(one)[:, places].mean(dim=1) for one in outputs], dim=1)
    assert len(outputs) == 2 and torch.allclose(vector, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["test_vmamba", "test_vit"])
def test_an_encoder_without_mixers_to_read_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"read is stream of \w+; got 'mixer'. Only Vim's blocks"):
        check_kinds(encoder(name), [Pooled()], "mixer")


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
