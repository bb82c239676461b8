"""Seeds of the three global generators on the CPU: Python's, NumPy's and torch's."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the generators at the end of the block; in the main process the model draws from them too."""
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.default_generator.set_state(pytorch)


def seed_transforms(seed: int) -> None:
    """Seed the generators for one sample.

    Args:
        seed: 64 bits, as `stable_hash` gives them.
    """
    # torch takes the low 32 bits. From equal seeds NumPy draws the same numbers as torch: crop and policy would depend
    # on each other.
    seed_generators(seed, seed >> 32)


def seed_generators(seed: int, numpy_seed: int) -> None:
    """Seed the generators of this process on the CPU, in 2 us.

    Args:
        seed: For Python and torch, 64 bits.
        numpy_seed: For NumPy, 32 bits, another number: from equal seeds NumPy draws the same numbers as torch.
    """
    random.seed(seed)
    np.random.seed(numpy_seed)
    torch.default_generator.manual_seed(seed)  # 1 us; torch.manual_seed takes 130 us, for devices not used here
