"""The teacher on several ranks: one teacher on all of them, and exact resume under DDP and FSDP2."""

from typing import Any

import pytest
from jobs import report_of

pytestmark = pytest.mark.slow  # its quick sibling is in test_teacher.py, on one rank


@pytest.fixture(scope="module")
def runs() -> dict[str, Any]:
    return report_of("teacher_job.py")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "fsdp2 in parts"])
def test_all_ranks_have_one_teacher_whose_run_goes_on_to_the_bit(strategy: str, runs: dict[str, Any]) -> None:
    """The head has batch normalisation, whose running statistics differ between the ranks of the student."""
    assert runs[strategy]["ranks"] == []
    assert runs[strategy]["the same"] == [[], []]


def test_shards_are_clipped_and_averaged_as_whole_tensors(runs: dict[str, Any]) -> None:
    assert runs["fsdp2"]["teacher"] == pytest.approx(runs["ddp"]["teacher"], rel=1e-5)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "fsdp2 in parts"])
@pytest.mark.parametrize("ranks", ["auto on 1", "ddp on 2", "fsdp2 on 4"])
def test_other_ranks_go_on_from_the_teacher_of_the_checkpoint(strategy: str, ranks: str, runs: dict[str, Any]) -> None:
    assert runs[strategy][ranks] == []
