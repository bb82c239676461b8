"""Processes that torchrun started join and leave."""

import os
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest
import torch
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


def threads_of_groups() -> int:
    count = 0
    for thread in os.listdir("/proc/self/task"):
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that ended since it was listed
            count += Path(f"/proc/self/task/{thread}/comm").read_text().startswith("pt_gloo")
    return count


def test_no_thread_of_a_group_runs_after_a_process_left() -> None:
    import_module("torch.distributed.nn.functional")
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1))
    model(torch.ones(1, 1)).backward()
    model.itself = [model]  # as a trainer and its callbacks do
    assert threads_of_groups() > 0
    del model
    ranks.leave()
    until = time.monotonic() + 10
    while threads_of_groups() and time.monotonic() < until:  # the system lists a thread a moment longer
        time.sleep(0.01)
    assert (threads_of_groups(), dist.is_initialized()) == (0, False)
