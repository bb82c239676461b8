"""Seeds: generators that depend on a key alone, and the global generators that image transforms draw from."""

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from ssmpretrain.base.environment import environment_number


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Put the generators back as they were: what draws inside may be the main process, whose draws are the model's."""
    import torch  # takes seconds, and who draws from a key alone needs none of it

    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.default_generator.set_state(pytorch)


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
    random.seed(number)
    np.random.seed(int.from_bytes(digest[8:12], "little"))  # from equal seeds NumPy and torch draw the same numbers
    torch.default_generator.manual_seed(number)  # 1 us; torch.manual_seed takes 130 us for devices that are not there
    if torch.cuda.is_available():
        torch.cuda.manual_seed(number)


def seed_transforms(seed: int) -> None:
    """Seed the generators, each with its own stream.

    Args:
        seed: 64 bits, as `stable_hash` gives them.
    """
    import torch

    random.seed(seed)
    # torch takes the low 32 bits, and from equal seeds NumPy draws the same numbers as torch: crop and policy would
    # depend on each other.
    np.random.seed(seed >> 32)
    torch.default_generator.manual_seed(seed)  # 1 us; torch.manual_seed takes 130 us, for devices not used here


def random_generator(*key: int | str) -> np.random.Generator:
    """Return a generator (Philox) that depends on the key and on nothing else in the process."""
    return np.random.Generator(np.random.Philox(key=stable_hash(*key)))


def stable_hash(*key: int | str) -> int:
    """Return a 64-bit hash of the key, the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")
