"""Each training step draws from a seed of its own."""

from types import SimpleNamespace
from typing import Any, cast

import torch

from ssmpretrain.training.checkpoints.exact_resume import ExactResume


def draw(epoch: int, batch: int, rank: int = 0) -> float:
    """Return the first number that a step draws."""
    callback = ExactResume()
    callback.load_state_dict({"seed": 7})
    callback._seed, callback._counted = 7, True
    trainer = SimpleNamespace(current_epoch=epoch, global_rank=rank)
    callback.on_train_batch_start(cast(Any, trainer), cast(Any, None), None, batch)
    return float(torch.rand(()))


def test_two_steps_draw_the_same_only_at_the_same_place() -> None:
    places = [(0, 0, 0), (0, 1, 0), (0, 2, 0), (1, 0, 0), (1, 1, 0), (0, 0, 1), (0, 1, 1)]
    drawn = [draw(*place) for place in places]
    assert len(set(drawn)) == len(places)
    assert drawn == [draw(*place) for place in places]
