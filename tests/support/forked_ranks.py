"""Several ranks from one process that has imported everything: a job of gloo ranks in well under a second."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


def in_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)` returns in each of `world` processes whose environment is that of a launcher's ranks.

    Call it before this process has run a backward pass: torch's threads do not survive a fork.
    """
    fork, port = multiprocessing.get_context("fork"), _free_port()
    jobs = []
    for rank in range(world):
        ours, theirs = fork.Pipe()
        process = fork.Process(target=_one, args=(theirs, rank, world, port, function, args))
        process.start()
        theirs.close()
        jobs.append((process, ours))
    results = [pipe.recv() for _, pipe in jobs]
    for process, _ in jobs:
        process.join()
    failures = [text for failed, text in results if failed]
    if failures:
        raise RuntimeError(f"{len(failures)} of {world} ranks failed, the first with\n{failures[0]}")
    return [value for _, value in results]


def _one(pipe: Connection, rank: int, world: int, port: int, function: Callable[..., Any], args: Any) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "NODE_RANK": 0, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"})
    try:
        pipe.send((False, function(*args)))
    except BaseException:
        pipe.send((True, traceback.format_exc()))
    os._exit(0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
