"""Warm-up and cosine."""

import pytest
import torch

from ssmpretrain.training.schedules import Cosine


def learning_rates(schedule: Cosine, total: int, per_epoch: int) -> list[float]:
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


@pytest.mark.parametrize("bad", [{"warmup_epochs": -1}, {"final_fraction": 1.5}])
def test_out_of_range_settings_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match="Cosine: " + next(iter(bad))):
        Cosine(**bad)
