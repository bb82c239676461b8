"""What every kernel test starts from: a seed, one thread, and outputs that are NaN until they are written."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Draw the same numbers whatever ran before: a gradient that nearly cancels has a larger relative error."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_outputs() -> Iterator[None]:
    """Let PyTorch fill what torch.empty returns with NaN, so that a kernel that skips an element is found out."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Run on one thread: the tensors are small, and the tests that compare thread counts set their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
