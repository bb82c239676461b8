"""The launcher of ranks, and the time that ranks wait for one another."""

from datetime import timedelta
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from ssmpretrain.training.ranks.launcher import Launcher, set_up_ranks


def test_a_rank_waits_ten_minutes_unless_the_recipe_says_otherwise(tmp_path: Path) -> None:
    ours, theirs = (Trainer(accelerator="cpu", devices=2, strategy=DDPStrategy(**options), logger=False)
                    for options in ({}, {"timeout": timedelta(seconds=5)}))  # fmt: skip
    for trainer in (ours, theirs):
        set_up_ranks(trainer, timedelta(minutes=10))
    assert (ours.strategy._timeout, theirs.strategy._timeout) == (timedelta(minutes=10), timedelta(seconds=5))
    assert isinstance(ours.strategy.launcher, Launcher)
