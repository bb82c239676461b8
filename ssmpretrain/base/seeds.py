"""Seeds: generators that depend on a key alone, and the global generators of Python, NumPy and torch on the CPU."""

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from ssmpretrain.base.environment import environment_number


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the global generators at the end of the block, because the model draws from them in the main process."""
    import torch  # the import takes seconds, and `random_generator` does not need torch

    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.default_generator.set_state(pytorch)


def seed_transforms(seed: int) -> None:
    """Seed the global generators on the CPU, so that NumPy and torch draw different numbers.

    Args:
        seed: A number of 64 bits, as `stable_hash` returns it.
    """
    # torch uses the low 32 bits. With equal seeds, NumPy and torch would draw the same numbers, and crop and policy
    # would depend on each other.
    seed_generators(seed, seed >> 32)


def seed_generators(seed: int, numpy_seed: int) -> None:
    """Seed the global generators of this process on the CPU; this takes 2 us.

    Args:
        seed: Seed of Python and torch, 64 bits.
        numpy_seed: Seed of NumPy, 32 bits. Use another number, because with equal seeds NumPy and torch draw the same
            numbers.
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
        rank: Number of the rank; each rank draws different numbers.
    """
    import torch

    digest = hashlib.blake2b(repr((seed, epoch, batch, rank)).encode(), digest_size=16).digest()
    number = int.from_bytes(digest[:8], "little", signed=True)
    seed_generators(number, int.from_bytes(digest[8:12], "little"))
    if torch.cuda.is_available():
        torch.cuda.manual_seed(number)


@contextmanager
def numpy_seeded(numbers: Sequence[int]) -> Iterator[None]:
    """Seed NumPy's global generator for the block, and restore its state at the end.

    Args:
        numbers: Seed, a sequence of numbers from 0 to 2**32 - 1.
    """
    state = np.random.get_state()
    np.random.seed(list(numbers))
    try:
        yield
    finally:
        np.random.set_state(state)


def seed_of_run() -> int | None:
    """Return the seed of `seed_everything`, which Lightning keeps in the environment; None if there is no seed."""
    seed = environment_number("PL_GLOBAL_SEED", -1)
    return None if seed < 0 else seed


def random_generator(*key: int | str) -> np.random.Generator:
    """Return a NumPy generator (Philox) that depends on the key alone."""
    return np.random.Generator(np.random.Philox(key=stable_hash(*key)))


def stable_hash(*key: int | str) -> int:
    """Return a 64-bit hash of the key, the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")
