"""LeJEPA on several ranks trains like one process with all images."""

from typing import Any

import pytest
from jobs import report_of

ROUNDING = 2e-6  # float32: sums over the images of a step in another order, 6e-8 a rounding
LATER = 1e-5  # after steps of AdamW, which divide small gradients by their own size


@pytest.fixture(scope="module")
def few() -> dict[str, Any]:
    return report_of("lejepa_job.py", "few")


@pytest.mark.parametrize("ranks", ["1", "2", "4", "2 uneven"])
def test_loss_and_all_gradients_averaged_over_ranks_are_those_worked_by_hand_in_float64(
    ranks: str, few: dict[str, Any]
) -> None:
    assert few["losses"][ranks] < ROUNDING


def test_a_run_on_two_ranks_has_the_gradients_and_losses_of_one(few: dict[str, Any]) -> None:
    assert few["ddp on 2"]["gradients"] < ROUNDING and few["ddp on 2"]["losses"] < LATER


@pytest.mark.slow
def test_every_number_of_ranks_and_every_strategy_does() -> None:
    report = report_of("lejepa_job.py", "more")
    stderr = report.pop("stderr")
    for job, result in report.items():
        assert result["gradients"] < ROUNDING and result["losses"] < LATER, (job, result, stderr)
