"""Processes that torchrun started join and leave."""

import sys

import pytest
import torch.distributed as dist

from ssmpretrain.base import ranks


def test_what_would_keep_the_group_alive_is_imported_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    known: list[bool] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delitem(sys.modules, "torch.distributed.nn.functional", raising=False)
    monkeypatch.setattr(
        dist, "init_process_group", lambda *_, **__: known.append("torch.distributed.nn.functional" in sys.modules)
    )
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with ranks.joined_ranks():
        pass
    assert known == [True]
