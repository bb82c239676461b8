"""Several processes on one job, as torchrun starts them: joining them, and passing rows of tensors between them.

Everything travels on the CPU, through gloo. In a process of its own every function is there too, and moves nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
_PATIENCE = timedelta(hours=6)  # ranks meet only when each has encoded its part
_left_alone = False  # see `alone`


@contextmanager
def joined_ranks() -> Iterator[None]:
    """Join the processes that torchrun started, if it did and they have not joined, until the end of the block."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or _joined():
        yield
        return
    # Imported later, its default arguments would keep the group alive: a thread of it that still clears up while the
    # interpreter leaves ends the process with SIGABRT.
    import_module("torch.distributed.nn.functional")
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def alone() -> Iterator[None]:
    """Behave as a process of its own until the end of the block, where the other ranks do not answer."""
    global _left_alone
    _left_alone = True
    try:
        yield
    finally:
        _left_alone = False


def rank() -> int:
    """This process's number among those that joined, from 0."""
    return dist.get_rank() if _joined() else 0


def world() -> int:
    """Number of processes that joined."""
    return dist.get_world_size() if _joined() else 1


def gather(value: T) -> list[T]:
    """Everyone's value, in the order of the ranks; small things only, as each rank gets all."""
    if not _joined():
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def take_first(tensors: Iterable[Tensor]) -> None:
    """Give the tensors, on the device of the job, the values that they have on rank 0, in place."""
    if _joined():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def broadcast_rows(rows: Tensor, source: int) -> Tensor:
    """The `rows` (n, ...) of rank `source`; the others' say only of which dtype and width they are."""
    if not _joined():
        return rows
    count = gather(len(rows))[source]
    theirs = rows.contiguous() if rank() == source else rows.new_empty((count, *rows.shape[1:]))
    dist.broadcast(theirs, source)
    return theirs


def gather_rows(rows: Tensor, target: int) -> list[Tensor]:
    """Everyone's `rows` (n, ...), n as each has it, on rank `target`; an empty list elsewhere."""
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
    """On rank 0, the items of all ranks, rank after rank; on the others nothing, when theirs have been taken.

    Rank 0 yields its own as they come; the others hold theirs until it is their turn.
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
    """Says that a rank has sent all."""


_END = _End()


def _joined() -> bool:
    return not _left_alone and dist.is_available() and dist.is_initialized()
