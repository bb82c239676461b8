"""Contrastive objectives on several ranks train like one process with all pairs."""

from typing import Any

import pytest
from jobs import report_of

ROUNDING = 2e-6  # float32: sums over eight pairs in another order, 6e-8 a rounding
LATER = 1e-5  # after steps of AdamW, which divide small gradients by their own size


@pytest.fixture(scope="module")
def few() -> dict[str, Any]:
    return report_of("contrastive_job.py", "few")


@pytest.fixture(scope="module")
def more() -> dict[str, Any]:
    return report_of("contrastive_job.py", "more")


@pytest.mark.parametrize("ranks", ["on 1", "on 2", "on 4", "of open_clip"])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_loss_and_all_gradients_averaged_over_ranks_are_those_worked_by_hand_in_float64(
    kind: str, ranks: str, few: dict[str, Any]
) -> None:
    assert few["losses"][f"{kind} {ranks}"] < ROUNDING


@pytest.mark.parametrize("job", ["clip ddp on 2, 2 batches", "siglip ddp on 4, 1 batches"])
def test_ranks_and_accumulated_batches_make_one_large_batch(job: str, few: dict[str, Any]) -> None:
    assert few[job]["gradients"] < ROUNDING and few[job]["losses"] < LATER


def test_ranks_with_different_numbers_of_pairs_stop_with_an_error_and_do_not_wait(few: dict[str, Any]) -> None:
    assert len(few["uneven"]) == 2
    assert all("got 4 on rank 0 and 3 on rank 1" in message for message in few["uneven"])


@pytest.mark.slow
def test_every_objective_and_strategy_does(more: dict[str, Any]) -> None:
    stderr = more.pop("stderr")
    for job, result in more.items():
        assert result["gradients"] < ROUNDING and result["losses"] < LATER, (job, result, stderr)
    assert more["hottest fsdp2 on 2, 2 batches"]["factor"] <= 100.001
