"""Several ranks from one process that has imported everything: a job of gloo ranks in well under a second."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any


def in_ranks(world: int, function: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
    """What `function(*args, **options)` returns in each of `world` processes, in the environment of a launcher's ranks.

    Where one fails the others are killed; one that is killed gives None. Call it before this process has run a backward
    pass: torch's threads do not survive a fork.
    """
    fork, port = multiprocessing.get_context("fork"), _free_port()
    ranks, pipes = [], []
    for rank in range(world):
        ours, theirs = fork.Pipe()
        ranks.append(fork.Process(target=_one, args=(theirs, rank, world, port, lambda: function(*args, **options))))
        ranks[-1].start()
        theirs.close()
        pipes.append(ours)
    results: dict[Any, Any] = {}
    while len(results) < world:
        for pipe in wait([pipe for pipe in pipes if pipe not in results]):
            failed, results[pipe] = _received(pipe)
            if failed:
                for process in ranks:
                    process.kill()
                raise RuntimeError(f"rank {pipes.index(pipe)} of {world} failed with\n{results[pipe]}")
    for process in ranks:
        process.join()
    return [results[pipe] for pipe in pipes]


def _received(pipe: Connection) -> tuple[bool, Any]:
    try:
        failed, value = pipe.recv()
        return failed, value
    except EOFError:
        return False, None


def _one(pipe: Connection, rank: int, world: int, port: int, function: Callable[[], Any]) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "NODE_RANK": 0, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"})
    try:
        pipe.send((False, function()))
    except BaseException:
        pipe.send((True, traceback.format_exc()))
    os._exit(0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
