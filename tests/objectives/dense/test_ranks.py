"""Segmentation on two ranks: scores over uneven shares are those of one process."""

from typing import Any

import pytest
from jobs import report_of


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return report_of("segmentation_job.py")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["test_vim UPerNet", "test_vmamba UPerNet", "test_vim Segmenter"])
def test_ranks_with_4_and_3_images_have_the_scores_of_one_process(model: str, report: dict[str, Any]) -> None:
    (alone,) = report[model]["alone"]
    assert report[model]["two"] == [alone, alone]
    assert set(alone) == {"val/mIoU", "val/mAcc", "val/aAcc"}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["test_vim UPerNet", "test_vmamba UPerNet", "test_vim Segmenter"])
def test_after_training_both_ranks_report_the_same_scores(model: str, report: dict[str, Any]) -> None:
    first, second = report[model]["trained"]
    assert first == second and first != report[model]["alone"][0]
