"""Ramps, and the weight decay that moves, against the published arrays and formulas."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ssmpretrain.training.optim.adamw import AdamW
from ssmpretrain.training.optim.parameter_table import group_table
from ssmpretrain.training.optim.ramps import Ramp
from ssmpretrain.training.optim.schedules import Cosine


def published_cosine(base: float, final: float, steps: int) -> np.ndarray[Any, Any]:
    """DINO's array of a schedule without a warm-up, one value per iteration."""
    return final + 0.5 * (base - final) * (1 + np.cos(np.pi * np.arange(steps) / steps))


def test_a_cosine_equals_the_published_array_at_every_step() -> None:
    ours = [Ramp(0.996, 1.0).at(step, 250, 25) for step in range(250)]
    np.testing.assert_allclose(ours, published_cosine(0.996, 1.0, 250), rtol=0, atol=1e-15)
    assert ours[0] == 0.996 and ours[-1] < 1.0 == Ramp(0.996, 1.0).at(250, 250, 25)


def test_a_line_over_some_epochs_goes_up_in_each_step_and_then_stays() -> None:
    ramp = Ramp(0.04, 0.07, "linear", epochs=30)
    values = [ramp.at(step, 1000, 10) for step in range(1000)]
    np.testing.assert_allclose(values[:300], 0.04 + 0.03 * np.arange(300) / 300, rtol=1e-14)
    assert set(values[300:]) == {0.07}


def test_a_ramp_of_a_fraction_of_an_epoch_and_one_of_less_than_a_step() -> None:
    assert Ramp(0, 1, "linear", epochs=0.5).at(1, 100, 8) == 0.25
    assert [Ramp(0, 1, "linear", epochs=0.01).at(step, 100, 8) for step in (0, 1)] == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.9, 1.0, "square"), "shape is cosine or linear; got 'square'"),
        ((0.9, math.nan), "start and end are finite; got 0.9 and nan"),
        ((0.9, 1.0, "linear", 0), "epochs is finite and above 0; got 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ramp(*arguments)


def test_a_ramp_describes_itself() -> None:
    assert str(Ramp(0.996, 1.0)) == "0.996 to 1 by half a cosine over the run"
    assert str(Ramp(0.04, 0.07, "linear", 30)) == "0.04 to 0.07 on a line over 30 epochs"
    assert str(Ramp(0.1, 0.1)) == "0.1"


# Weight decay


def built(steps: int, steps_per_epoch: int, **settings: Any) -> tuple[Any, Any]:
    """The optimizer of a layer with a weight and a bias, and its scheduler."""
    optimizer = AdamW(weight_decay=0.04, final_weight_decay=0.4, **settings).build(nn.Linear(3, 2), 256)
    return optimizer, Cosine(warmup_epochs=1).build(optimizer, steps, steps_per_epoch, in_epochs=True)


def decays(optimizer: Any, scheduler: Any, steps: int) -> list[list[float]]:
    values = []
    for _ in range(steps):
        values.append([group["weight_decay"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return values


def test_weight_decay_equals_the_published_array_and_the_biases_have_none() -> None:
    values = np.array(decays(*built(40, 10), 40))
    np.testing.assert_allclose(values[:, 0], published_cosine(0.04, 0.4, 40), rtol=1e-14)
    assert not values[:, 1].any()


def test_adamw_takes_the_weight_decay_of_each_step() -> None:
    """Without gradient moments, a step multiplies the weight by 1 - lr * weight decay."""
    layer = nn.Linear(3, 2, bias=False).double()
    optimizer = AdamW(lr_per_256=0.1, weight_decay=0.04, final_weight_decay=0.4).build(layer, 256)
    scheduler = Cosine(warmup_epochs=0, final_fraction=1.0).build(optimizer, 4, 2)
    expected = layer.weight.detach().clone()
    for decay in published_cosine(0.04, 0.4, 4):
        layer.weight.grad = torch.zeros_like(layer.weight)
        optimizer.step()
        scheduler.step()
        expected *= 1 - 0.1 * decay
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("then", [10, 5])
def test_a_continued_run_keeps_its_place_in_epochs(then: int) -> None:
    """After 2 of 4 epochs, with the same or half as many steps an epoch."""
    optimizer, scheduler = built(40, 10)
    decays(optimizer, scheduler, 20)
    continued, rest = built(4 * then, then)
    rest.load_state_dict(scheduler.state_dict())
    expected = published_cosine(0.04, 0.4, 4 * then)[2 * then :]
    np.testing.assert_allclose([decay for decay, _ in decays(continued, rest, 2 * then)], expected, rtol=1e-14)


def test_a_changed_end_counts_in_a_continued_run() -> None:
    optimizer, scheduler = built(40, 10)
    decays(optimizer, scheduler, 20)
    continued = AdamW(weight_decay=0.1, final_weight_decay=0.2).build(nn.Linear(3, 2), 256)
    Cosine().build(continued, 40, 10).load_state_dict(scheduler.state_dict())
    assert continued.param_groups[0]["weight_decay"] == pytest.approx(0.15)


def test_weight_decay_stays_without_an_end() -> None:
    optimizer = AdamW(weight_decay=0.04).build(nn.Linear(3, 2), 256)
    assert {decay for decay, _ in decays(optimizer, Cosine(1).build(optimizer, 8, 2), 8)} == {0.04}


def test_the_log_and_the_table_say_where_weight_decay_goes() -> None:
    optimizer, _ = built(40, 10)
    assert (
        AdamW(weight_decay=0.04, final_weight_decay=0.4)
        .describe(256)
        .endswith("; weight decay from 0.04 to 0.4 by half a cosine")
    )
    assert "0.04 to 0.4" in group_table(optimizer.param_groups)


def test_a_negative_end_is_refused() -> None:
    with pytest.raises(ValueError, match="final_weight_decay is finite and at least 0; got -1"):
        AdamW(final_weight_decay=-1)
