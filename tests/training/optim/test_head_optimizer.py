"""Optimizers of a probe's heads: steps by hand, groups by rate and rule, and settings that are refused."""

import pytest
import torch
from torch import Tensor, nn

from ssmpretrain.training.optim import LARS, SGD, HeadAdamW
from ssmpretrain.training.optim.head_optimizer import HeadOptimizer
from ssmpretrain.training.optim.optimizer_state import matched


class Heads(nn.Module):
    """Two heads of one weight and one bias each, and a third that chooses AdamW for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(1, 1) for _ in range(3))
        for head, rate in zip(self.heads, (0.5, 0.25, 0.125), strict=True):
            head.lr_per_256 = rate  # type: ignore[assignment]
            nn.init.constant_(head.weight, 2.0)
            nn.init.constant_(head.bias, 4.0)
        self.heads[2].trains_with = "adamw"  # type: ignore[assignment]
        self.encoder = nn.Linear(1, 1)

    def set_gradients(self, weight: float, bias: float) -> None:
        for head in self.heads:
            head.weight.grad, head.bias.grad = torch.tensor([[weight]]), torch.tensor([bias])


def numbers(head: nn.Module) -> list[float]:
    return [float(parameter.detach()) for parameter in head.parameters()]


def test_two_steps_of_sgd_by_hand_decay_biases_too() -> None:
    model = Heads()
    optimizer = SGD(weight_decay=0.1, momentum=0.9).build(model, global_batch=512)
    model.set_gradients(1.0, 0.0)
    optimizer.step()
    # lr 1: m = g + 0.1 p = 1.2 and 0.4
    assert numbers(model.heads[0]) == pytest.approx([2 - 1.2, 4 - 0.4])
    model.set_gradients(0.0, 1.0)
    optimizer.step()
    assert numbers(model.heads[0]) == pytest.approx([0.8 - (0.9 * 1.2 + 0.08), 3.6 - (0.9 * 0.4 + 1.36)])


@pytest.mark.parametrize("settings", [SGD(), HeadAdamW(), LARS()])
def test_each_head_has_its_rate_and_the_encoder_none(settings: HeadOptimizer) -> None:
    model = Heads()
    groups = settings.build(model, global_batch=512).param_groups
    rates = {name: group["lr"] for group in groups for name in group["param_names"]}
    assert rates == {
        f"heads.{n}.{part}": 2 * lr for n, lr in enumerate((0.5, 0.25, 0.125)) for part in ("weight", "bias")
    }
    own = next(group for group in groups if "heads.2.weight" in group["param_names"])
    assert (own["steps_with"], own["weight_decay"], own["betas"]) == ("adamw", 0.0, (0.9, 0.999))


def test_adamw_of_heads_is_torchs_and_a_head_of_its_own_kind_has_no_decay() -> None:
    model, twin = Heads(), Heads()
    optimizer = HeadAdamW(weight_decay=0.5, betas=(0.8, 0.9), eps=1e-6).build(model, 256)
    truth = torch.optim.AdamW(twin.heads[0].parameters(), lr=0.5, weight_decay=0.5, betas=(0.8, 0.9), eps=1e-6)
    own = torch.optim.AdamW(twin.heads[2].parameters(), lr=0.125, weight_decay=0.0)
    for step in range(3):
        for one in (model, twin):
            one.set_gradients(1.0 + step, -1.0)
        for one in (optimizer, truth, own):
            one.step()
    assert numbers(model.heads[0]) == pytest.approx(numbers(twin.heads[0]))
    assert numbers(model.heads[2]) == pytest.approx(numbers(twin.heads[2]))


def test_the_state_of_one_kind_is_not_taken_by_another() -> None:
    model = Heads()
    saved = SGD().build(model, 256).state_dict() | {"class": "SgdAndAdamW"}
    with pytest.raises(ValueError, match="the state in the checkpoint is of SgdAndAdamW; LarsAndAdamW, which"):
        matched(LARS().build(model, 256), saved)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (SGD, {"momentum": 1.0}, r"SGD: momentum lies in \[0, 1\); got 1.0"),
        (SGD, {"weight_decay": -1.0}, "SGD: weight_decay is finite and at least 0; got -1.0"),
        (HeadAdamW, {"weight_decay": float("nan")}, "HeadAdamW: weight_decay is finite"),
        (HeadAdamW, {"betas": (0.9, 1.0)}, r"HeadAdamW: betas lie in \[0, 1\); got \[0.9, 1.0\]"),
        (HeadAdamW, {"eps": 0.0}, "HeadAdamW: eps is finite and above 0; got 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(
    kind: type[HeadOptimizer], settings: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**settings)
