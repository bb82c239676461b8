"""Seeds: generators that depend on a key alone, and the global ones on the CPU: Python's, NumPy's and torch's."""

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from ssmpretrain.base.environment import environment_number


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the generators at the end of the block; in the main process the model draws from them too."""
    import torch  # takes seconds, and a generator that depends on a key alone needs none of it

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
    # torch takes the low 32 bits. From equal seeds NumPy draws the same numbers as torch: crop and policy would depend
    # on each other.
    seed_generators(seed, seed >> 32)


def seed_generators(seed: int, numpy_seed: int) -> None:
    """Seed the generators of this process on the CPU, in 2 us.

    Args:
        seed: For Python and torch, 64 bits.
        numpy_seed: For NumPy, 32 bits, another number: from equal seeds NumPy draws the same numbers as torch.
    """
    import torch

    random.seed(seed)
    np.random.seed(numpy_seed)
    torch.default_generator.manual_seed(seed)  # 1 us; torch.manual_seed takes 130 us, for devices not used here


def seed_step(seed: int, epoch: int, batch: int, rank: int) -> None:
    """Seed the global generators of Python, NumPy and torch (CPU and GPU) for one training batch of one rank.

    Args:
        seed: The seed of the run.
        epoch: Number of the epoch, from 0.
        batch: Number of the batch in the epoch, from 0.
        rank: Number of the rank; each rank draws other numbers.
    """
    import torch

    digest = hashlib.blake2b(repr((seed, epoch, batch, rank)).encode(), digest_size=16).digest()
    number = int.from_bytes(digest[:8], "little", signed=True)
    seed_generators(number, int.from_bytes(digest[8:12], "little"))
    if torch.cuda.is_available():
        torch.cuda.manual_seed(number)


@contextmanager
def numpy_seeded(numbers: Sequence[int]) -> Iterator[None]:
    """Seed NumPy's global generator until the end of the block, and restore its state then.

    Args:
        numbers: The seed, each number from 0 to 2**32 - 1.
    """
    state = np.random.get_state()
    np.random.seed(list(numbers))
    try:
        yield
    finally:
        np.random.set_state(state)


def seed_of_run() -> int | None:
    """Return the seed that `seed_everything` was given, which Lightning keeps in the environment; None for none."""
    seed = environment_number("PL_GLOBAL_SEED", -1)
    return None if seed < 0 else seed


def random_generator(*key: int | str) -> np.random.Generator:
    """Return a generator (Philox) that depends on the key and on nothing else in the process."""
    return np.random.Generator(np.random.Philox(key=stable_hash(*key)))


def stable_hash(*key: int | str) -> int:
    """Return a 64-bit hash of the key, the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")
