"""The launcher of ranks: all ranks of one machine end together, however one of them ends."""

from __future__ import annotations

import atexit
import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from lightning.pytorch import Trainer

from ssmpretrain.base.environment import environment_number
from ssmpretrain.base.errors import UserError
from ssmpretrain.base.lightning_private import ScriptLauncher, limit_waiting, script_children, use_launcher

_log = logging.getLogger(__name__)
# Programs that start processes on several nodes set one of these variables in each process.
_LAUNCHERS = ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "OMPI_COMM_WORLD_SIZE", "LSB_JOBID", "NODE_RANK")
_PARENT = "SSMPRETRAIN_PARENT"  # environment variable with the process id of the rank that started this one
_GRACE = 15.0  # seconds in which a rank may notice and report a lost rank by itself
_EVERY = 0.5  # seconds between two checks


class Launcher(ScriptLauncher):
    """Start the other ranks as Lightning's own launcher does, and watch them.

    Lightning's launcher kills the whole job five seconds after a rank has died, without a message, and does not watch
    the first rank. This launcher gives the remaining ranks time to notice and to name the lost rank. Then it ends all
    ranks that hang.
    """

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            os.environ[_PARENT] = str(os.getpid())
            self.start_children()
            atexit.register(end_ranks, self.procs)
            _watch(lambda: _lost_child(self.procs), lambda: end_ranks(self.procs, grace=0))
        elif os.environ.get(_PARENT) == str(os.getppid()):
            parent = os.getppid()
            _watch(lambda: None if os.getppid() == parent else "rank 0 is gone", lambda: None)
        self.limit_threads()
        return function(*args, **kwargs)


def set_up_ranks(trainer: Trainer, timeout: timedelta) -> None:
    """Replace Lightning's launcher by `Launcher`, and let ranks wait for one another no longer than `timeout`.

    If the strategy in the recipe sets its own timeout, that one is kept.
    """
    use_launcher(trainer.strategy, Launcher)
    limit_waiting(trainer.strategy, timeout)


def check_launcher(trainer: Trainer) -> None:
    """Check that the launcher started as many processes on as many nodes as the recipe asks for.

    Raises:
        UserError: If no launcher starts the other nodes, or the numbers differ. Each process would train alone.
    """
    if trainer.num_nodes > 1 and not any(name in os.environ for name in _LAUNCHERS):
        raise UserError(
            f"trainer: this recipe is for {trainer.num_nodes} nodes, and no launcher (srun, torchrun, mpirun) started "
            "this process. On one machine add --trainer.num_nodes 1."
        )
    started = environment_number("WORLD_SIZE", 1) if "TORCHELASTIC_RUN_ID" in os.environ else trainer.world_size
    if environment_number("SLURM_PROCID", 0) and trainer.world_size == 1:
        started = environment_number("SLURM_NTASKS", 2)
    if started != trainer.world_size:  # each would train alone, all in one folder
        nodes = environment_number("GROUP_WORLD_SIZE", environment_number("SLURM_NNODES", 1))
        raise UserError(
            f"trainer: the launcher started {started} processes, and the recipe is for {trainer.world_size} "
            f"({trainer.num_devices} devices on {trainer.num_nodes} nodes). "
            f"Add --trainer.devices {started // nodes} --trainer.num_nodes {nodes}."
        )


def _watch(lost: Callable[[], str | None], clean_up: Callable[[], None]) -> None:
    """Check regularly whether another rank is lost. If so, end this process unless it soon ends by itself."""

    def look() -> None:
        while (what := lost()) is None:
            time.sleep(_EVERY)
        time.sleep(_GRACE)
        _log.error("%s, and this rank still waits for it; start the same command again to continue", what)
        clean_up()
        os._exit(1)  # nothing else would end a main thread that waits in a collective operation

    threading.Thread(target=look, daemon=True, name="rank watch").start()


def _lost_child(children: list[subprocess.Popen[bytes]]) -> str | None:
    for rank, child in enumerate(children, start=1):
        if child.poll():
            return f"local rank {rank} (process {child.pid}) ended with code {child.returncode}"
    return None


def take_children(trainer: Trainer) -> list[subprocess.Popen[bytes]]:
    """Return the ranks that this process started, and forget them, so that a second call returns none.

    The watching thread shares the list. A rank that is no longer in the list may end without ending this process.
    """
    started = script_children(trainer)
    children = list(started)
    started.clear()
    return children


def end_ranks(children: list[subprocess.Popen[bytes]], grace: float = _GRACE) -> None:
    """Wait `grace` seconds for other ranks to end, then kill the remaining ones."""
    until = time.monotonic() + grace
    for child in children:
        try:
            child.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
