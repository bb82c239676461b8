"""Ranks: the processes of one job, as torchrun starts them, and the exchange of values and rows of tensors.

Commands exchange through gloo, on the CPU. In a single process every function works too, and sends nothing.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from threading import Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ssmpretrain.base.environment import environment_number

T = TypeVar("T")
_PATIENCE = timedelta(hours=6)  # ranks meet only when each has encoded its part
_MOST_LEAVING = 10.0  # seconds that a process waits at its end for exchanges that never come
_left_alone = False  # see `alone`


@contextmanager
def joined_ranks() -> Iterator[None]:
    """Join the processes that torchrun started, until the end of the block.

    A single process, or processes that have joined already, do nothing.
    """
    if environment_number("WORLD_SIZE", 1) == 1 or _joined():
        yield
        return
    # Imported later, its default arguments would keep the group alive. A thread of the group that still runs when the
    # interpreter ends aborts the process.
    import_module("torch.distributed.nn.functional")
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def leave() -> None:
    """Leave the job at the end of a process, when nothing uses the trainer any more.

    A thread of a process group that still runs when the interpreter ends can abort the process. The exit code of a
    complete run is then 134. The threads end when nothing refers to their group.
    """
    if _joined():
        leaving = Thread(target=_drop_groups, daemon=True)
        leaving.start()
        leaving.join(_MOST_LEAVING)


def _drop_groups() -> None:
    gc.collect()  # a trainer refers to groups, and to itself
    dist.destroy_process_group()
    gc.collect()


@contextmanager
def alone() -> Iterator[None]:
    """Act as a single process until the end of the block, for when the other ranks do not answer."""
    global _left_alone
    _left_alone = True
    try:
        yield
    finally:
        _left_alone = False


def rank() -> int:
    """Return the number of this process among the joined ones, from 0."""
    return dist.get_rank() if _joined() else 0


def world() -> int:
    """Return the number of processes that joined."""
    return dist.get_world_size() if _joined() else 1


def gather(value: T) -> list[T]:
    """Return the values of all ranks, in their order. Every rank gets all, so use it for small values."""
    if not _joined():
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def total(counts: Tensor) -> Tensor:
    """Return the sum of the tensors of all ranks, of one shape and dtype; on the device of `counts`."""
    if not _joined():
        return counts
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    summed = counts.to(device, copy=True)
    dist.all_reduce(summed)
    return summed.to(counts.device)


def take_first(tensors: Iterable[Tensor]) -> None:
    """Copy the values of rank 0 into the tensors of all ranks, in place; the tensors are on the device of the job."""
    if _joined():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def broadcast_rows(rows: Tensor, source: int) -> Tensor:
    """Return the `rows` (n, ...) of rank `source`. The rows of other ranks give only dtype and width."""
    if not _joined():
        return rows
    count = gather(len(rows))[source]
    theirs = rows.contiguous() if rank() == source else rows.new_empty((count, *rows.shape[1:]))
    dist.broadcast(theirs, source)
    return theirs


def gather_rows(rows: Tensor, target: int) -> list[Tensor]:
    """Return the `rows` (n, ...) of all ranks on rank `target`, and an empty list elsewhere; n may differ."""
    if not _joined():
        return [rows]
    counts = gather(len(rows))
    if rank() != target:
        dist.send(rows.contiguous(), target)
        return []
    parts = [rows if source == target else rows.new_empty((n, *rows.shape[1:])) for source, n in enumerate(counts)]
    for source, part in enumerate(parts):
        if source != target:
            dist.recv(part, source)
    return parts


def in_order(items: Iterator[T]) -> Iterator[T]:
    """Yield the items of all ranks on rank 0, rank after rank. Other ranks send their items, and yield nothing.

    Rank 0 yields its own items as they come. Each other rank collects its items, and sends them when its turn comes.
    """
    if rank() > 0:
        for item in list(items):
            dist.send_object_list([item], 0)
        dist.send_object_list([_END], 0)
        return
    yield from items
    for source in range(1, world()):
        while True:
            received: list[Any] = [None]
            dist.recv_object_list(received, source)
            if isinstance(received[0], _End):
                break
            yield received[0]


class _End:
    """The mark that a rank has sent all its items."""


_END = _End()


def _joined() -> bool:
    return not _left_alone and dist.is_available() and dist.is_initialized()
