"""Seeds: the same numbers for the same key, and generators put back as they were."""

import random

import numpy as np
import pytest
import torch

from ssmpretrain.base.seeds import numpy_seeded, random_state_kept, seed_of_run, seed_step


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_a_step_draws_the_same_numbers_again_and_every_rank_batch_and_epoch_others() -> None:
    with random_state_kept():
        keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
        drawn = []
        for key in [*keys, keys[0]]:
            seed_step(*key)
            drawn.append(draws())
    assert drawn[0] == drawn[-1] and len({number for row in drawn for number in row}) == 15


def test_what_is_drawn_inside_changes_nothing_outside() -> None:
    with random_state_kept():
        seed_step(1, 2, 3, 4)
        expected = draws()
        seed_step(1, 2, 3, 4)
        with random_state_kept():
            seed_step(5, 6, 7, 8)
            draws()
        with numpy_seeded([1, 2]):
            np.random.rand()
        assert draws() == expected


def test_the_seed_of_the_run_is_lightnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert seed_of_run() == 7
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert seed_of_run() is None
