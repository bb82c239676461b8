"""Groups of settings with several kinds."""

from dataclasses import dataclass

import pytest

from ssmpretrain.training.optim.adamw import AdamW
from ssmpretrain.training.optim.schedules import Cosine, Poly, Schedule, Steps
from ssmpretrain.training.settings import plain


@pytest.mark.parametrize("settings", [Cosine(3), Poly(0.9, warmup_steps=7), Steps(milestone_epochs=[8, 11])])
def test_settings_return_from_plain_data_as_the_same_kind(settings: Schedule) -> None:
    data = plain(settings)
    assert data["kind"] == type(settings).__name__
    assert Schedule.of(data) == settings


def test_settings_without_a_kind_are_those_of_earlier_versions() -> None:
    assert Schedule.of({"warmup_epochs": 5}) == Cosine(5)
    assert Cosine.of({"warmup_epochs": 5, "kind": "Cosine"}) == Cosine(5)


def test_plain_data_of_other_values_has_no_kind() -> None:
    assert "kind" not in plain(AdamW()) and plain([1]) == [1]


def test_an_unknown_or_abstract_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Schedule: no kind is called 'Cosin'\. Did you mean 'Cosine'"):
        Schedule.of({"kind": "Cosin"})
    with pytest.raises(ValueError, match="no kind is called 'Schedule'"):
        Schedule.of({"kind": "Schedule"})


def test_a_kind_from_another_package_is_found() -> None:
    @dataclass
    class Constant(Schedule):
        def over(self, total_steps: int, steps_per_epoch: float):
            return lambda step: 1.0

    assert isinstance(Schedule.of({"kind": "Constant"}), Constant)
