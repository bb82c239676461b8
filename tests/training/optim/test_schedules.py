"""Warm-up, cosine, powers and steps."""

import logging
import math
from typing import Any

import pytest
import torch
from timm.scheduler import CosineLRScheduler

from ssmpretrain.training.optim.schedules import Cosine, Poly, Schedule, Steps


def learning_rates(schedule: Schedule, total: int, per_epoch: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = schedule.build(optimizer, total, per_epoch)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    assert learning_rates(Cosine(warmup_epochs=2), 20, 5)[:11] == pytest.approx([*[i / 10 for i in range(1, 11)], 1.0])


def test_half_way_down_the_cosine_is_half_the_peak() -> None:
    assert learning_rates(Cosine(warmup_epochs=0), 100, 10)[50] == pytest.approx(0.5)


def test_it_ends_at_the_final_fraction() -> None:
    assert Cosine(warmup_epochs=0, final_fraction=0.1).factor(100, 100, 0) == pytest.approx(0.1)


def test_a_warm_up_longer_than_the_run_is_cut_to_it() -> None:
    assert learning_rates(Cosine(warmup_epochs=40), 4, 2)[-1] == pytest.approx(1.0)


def test_warm_up_rises_from_the_initial_fraction() -> None:
    schedule = Cosine(warmup_epochs=1, initial_fraction=0.2)
    assert learning_rates(schedule, 8, 4)[:5] == pytest.approx([0.4, 0.6, 0.8, 1.0, 1.0])


def test_a_cosine_that_counts_from_the_start_of_the_run_is_timms() -> None:
    parameter = torch.zeros(1, requires_grad=True)
    theirs = CosineLRScheduler(torch.optim.SGD([parameter], lr=1.0), t_initial=20, lr_min=0.05, warmup_t=5,
                               warmup_lr_init=0.2, t_in_epochs=False)  # fmt: skip
    ours = Cosine(warmup_epochs=1, initial_fraction=0.2, final_fraction=0.05, warmup_prefix=False)
    expected = [theirs._get_lr(step)[0] for step in range(5, 20)]
    assert learning_rates(ours, 20, 5)[5:] == pytest.approx(expected)
    later = Cosine(warmup_epochs=1, initial_fraction=0.2, final_fraction=0.05)
    assert learning_rates(later, 20, 5)[5] == 1.0 > expected[0]


def test_a_cosine_by_epoch_is_torchs_and_warms_up_in_every_step() -> None:
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(
        torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0), 4, eta_min=0
    )
    expected = []
    for _ in range(4):
        expected += [theirs.get_last_lr()[0]] * 3
        theirs.optimizer.step()
        theirs.step()
    assert learning_rates(Cosine(0, by_epoch=True), 12, 3) == pytest.approx(expected)
    warmed = learning_rates(Cosine(warmup_epochs=1.5, by_epoch=True), 16, 4)
    assert warmed[:8] == pytest.approx([*[i / 6 for i in range(1, 7)], 1.0, 1.0])
    assert len(set(warmed[8:12])) == 1 and warmed[8] == pytest.approx(Cosine(1.5).factor(8, 16, 6))


def test_both_fractions_at_1_keep_the_peak() -> None:
    assert set(learning_rates(Cosine(5, final_fraction=1, initial_fraction=1), 30, 2)) == {1.0}


def test_without_an_initial_fraction_the_rates_are_those_of_earlier_runs_to_the_bit() -> None:
    schedule = Cosine(warmup_epochs=1)
    assert [schedule.factor(step, 9, 7) for step in range(7)] == [(step + 1) / 7 for step in range(7)]


@pytest.mark.parametrize("bad", [{"warmup_epochs": -1}, {"final_fraction": 1.5}, {"initial_fraction": -0.1}])
def test_out_of_range_settings_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match="Cosine: " + next(iter(bad))):
        Cosine(**bad)


def test_a_power_of_1_is_a_straight_line_from_the_end_of_the_warm_up() -> None:
    schedule = Poly(power=1.0, warmup_steps=2, initial_fraction=0.5)
    assert learning_rates(schedule, 6, 100) == pytest.approx([0.75, 1.0, 1.0, 0.75, 0.5, 0.25])
    assert Poly(final_fraction=0.2).over(4, 1)(4) == pytest.approx(0.2)
    assert Poly(0.9).over(10, 1)(5) == pytest.approx(0.5**0.9)


def test_a_power_that_counts_from_the_start_of_the_run_is_multiplied_by_the_warm_up() -> None:
    schedule = Poly(power=2.0, warmup_epochs=0.5, warmup_prefix=False)  # 2 of 4 steps
    assert learning_rates(schedule, 4, 4) == pytest.approx([0.5 * 1.0, 1.0 * 0.75**2, 0.5**2, 0.25**2])


def test_the_rate_falls_after_each_milestone() -> None:
    by_epoch = Steps(milestone_epochs=[2, 3], warmup_steps=2, initial_fraction=0.0)
    assert learning_rates(by_epoch, 8, 2) == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01])
    by_step = Steps(milestone_steps=[1, 3], gamma=0.5)
    assert learning_rates(by_step, 4, 2) == pytest.approx([1.0, 0.5, 0.5, 0.25])


def test_milestones_after_the_end_of_the_run_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Steps(milestone_steps=[3, 8]).over(8, 2)
    assert "1 of 2 milestones are not reached, since the run ends after 8 steps" in caplog.text
    caplog.clear()
    Steps(milestone_steps=[3, 7]).over(8, 2)
    assert not caplog.text


def test_a_warm_up_that_fills_the_run_is_cut_and_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert learning_rates(Poly(warmup_steps=1500), 4, 2) == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert "the warm-up of 1500 steps fills the run of 4, so the learning rate only rises" in caplog.text
    caplog.clear()
    Poly(warmup_steps=3).over(4, 2)
    assert not caplog.text


@pytest.mark.parametrize(
    ("kind", "bad", "message"),
    [
        (Poly, {"power": 0.0}, "Poly: power is finite and above 0; got 0.0"),
        (Poly, {"power": math.nan}, "Poly: power is finite"),
        (Poly, {"final_fraction": 2.0}, "Poly: final_fraction is a fraction"),
        (Poly, {"warmup_steps": -1}, "Poly: warmup_steps is finite and at least 0; got -1"),
        (
            Poly,
            {"warmup_steps": 5, "warmup_epochs": 1.0},
            "in steps or in epochs; got warmup_steps 5 and warmup_epochs",
        ),
        (Steps, {}, "milestones are in epochs or in steps; got none"),
        (Steps, {"milestone_steps": [1], "milestone_epochs": [1]}, "in epochs or in steps; got both"),
        (Steps, {"milestone_steps": [2, 1]}, r"milestone_steps are above 0 and ascending; got \[2, 1\]"),
        (Steps, {"milestone_epochs": [0]}, "milestone_epochs are above 0"),
        (Steps, {"milestone_epochs": [math.inf]}, "milestone_epochs are above 0"),
        (Steps, {"milestone_steps": [1], "gamma": 0.0}, "gamma is a factor in"),
        (Steps, {"milestone_steps": [1], "initial_fraction": math.nan}, "Steps: initial_fraction"),
    ],
)
def test_wrong_settings_of_powers_and_steps_are_refused(kind: Any, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**bad)


@pytest.mark.parametrize("bad", [{"last_epoch": -5}, {"last_epoch": math.nan}, {"ahead": math.nan}, {"ahead": -9},
    {"steps_per_epoch": 0}])  # fmt: skip
def test_a_state_that_says_no_place_is_refused(bad: dict[str, float]) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = Cosine(warmup_epochs=1).build(optimizer, 8, 4)
    state = schedule.state_dict()
    schedule.load_state_dict(state)
    with pytest.raises(ValueError, match=r"schedule: a place is a whole number of steps.* Give an earlier checkpoint"):
        schedule.load_state_dict({**state, **bad})
