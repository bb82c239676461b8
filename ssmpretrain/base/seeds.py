"""The three global generators that image transforms draw from: Python's, NumPy's and torch's."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Put the generators back as they were: what draws inside may be the main process, whose draws are the model's."""
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.default_generator.set_state(pytorch)


def seed_transforms(seed: int) -> None:
    """Seed the generators, each with its own stream.

    Args:
        seed: 64 bits, as `stable_hash` gives them.
    """
    random.seed(seed)
    # torch takes the low 32 bits, and from equal seeds NumPy draws the same numbers as torch: crop and policy would
    # depend on each other.
    np.random.seed(seed >> 32)
    torch.default_generator.manual_seed(seed)  # 1 us; torch.manual_seed takes 130 us, for devices not used here
