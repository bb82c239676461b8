"""`torch.func.vmap` over a part of what an encoder computes, the rest being as it always is."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ssmpretrain

FORMS: list[tuple[str, dict[str, Any]]] = [
    ("test_vim", {"img_size": 32, "depth": 2}),
    ("test_vim", {"img_size": 32, "depth": 1, "bidirectional": "ssm"}),
    ("test_vim", {"img_size": 32, "depth": 2, "bidirectional": "layer"}),
    ("test_arm", {"img_size": 32, "depth": 1}),
    ("test_vmamba", {}),
    ("test_vmamba2", {"depths": (1, 1)}),
]


@pytest.fixture(params=FORMS, ids=lambda form: "-".join([form[0], *map(str, form[1].values())]))
def encoder(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    name, arguments = request.param
    encoder = ssmpretrain.create_encoder(name, num_classes=3, drop_path_rate=0.0, **arguments)
    with torch.no_grad():
        for parameter in encoder.parameters():  # none is zero, so that each counts
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return encoder


@pytest.fixture
def image() -> Tensor:
    return torch.randn(1, 3, 32, 32)


def test_any_parameter_may_be_mapped_alone(encoder: nn.Module, image: Tensor) -> None:
    first_of_kind: dict[str, str] = {}
    for name, _ in encoder.named_parameters():
        first_of_kind.setdefault(re.sub(r"\d+", "", name), name)
    for name in first_of_kind.values():
        value = encoder.get_parameter(name).detach()
        values = torch.stack([value, 1.2 * value])

        def logits(value: Tensor, name: str = name) -> Tensor:
            return torch.func.functional_call(encoder, {name: value}, (image,))

        each = torch.stack([logits(value) for value in values])
        assert not torch.equal(each[0], each[1]), name
        torch.testing.assert_close(
            torch.vmap(logits)(values), each, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("frozen", [False, True])
def test_an_encoder_that_nothing_maps_may_be_part_of_what_is_mapped(
    encoder: nn.Module, image: Tensor, frozen: bool
) -> None:
    encoder.requires_grad_(not frozen).train(not frozen)
    factors = torch.tensor([1.0, 2.0])
    given = torch.vmap(lambda factor: encoder(image) * factor)(factors)
    expected = encoder(image)
    torch.testing.assert_close(given, torch.stack([expected, 2 * expected]), rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_is_left_out_under_a_transform(encoder: nn.Module, image: Tensor) -> None:
    name = next(name for name, _ in encoder.named_parameters() if name.endswith("in_proj.weight"))
    value = encoder.get_parameter(name).detach()

    def logits(value: Tensor) -> Tensor:
        return torch.func.functional_call(encoder, {name: value}, (image,))

    expected, gradient = logits(value), torch.func.grad(lambda value: logits(value).sum())(value)
    encoder.set_grad_checkpointing(True)
    torch.testing.assert_close(torch.vmap(logits)(value.unsqueeze(0))[0], expected, rtol=1e-4, atol=1e-4)
    again = torch.func.grad(lambda value: logits(value).sum())(value)
    torch.testing.assert_close(again, gradient, rtol=1e-4, atol=1e-4)
