"""Ranks that one command started on one machine end together, however one of them ends."""

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

from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch.distributed.constants import default_pg_timeout

_log = logging.getLogger(__name__)
_PARENT = "SSMPRETRAIN_PARENT"  # tells a rank that it was started by another, and by which process
_GRACE = 15.0  # seconds that a rank has to notice by itself that another is gone, and to say so
_EVERY = 0.5  # seconds between two looks


class Launcher(_SubprocessScriptLauncher):
    """Starts the other ranks as Lightning's own does, and looks after them in another way.

    Lightning's kills the whole job five seconds after a rank has died, without a word, and does not look whether the
    first rank lives. Here the others have time to notice and to name the lost one; what hangs is then ended.
    """

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            os.environ[_PARENT] = str(os.getpid())
            self._call_children_scripts()
            atexit.register(end_ranks, self.procs)
            _watch(lambda: _lost_child(self.procs), lambda: end_ranks(self.procs, grace=0))
        elif os.environ.get(_PARENT) == str(os.getppid()):
            parent = os.getppid()
            _watch(lambda: None if os.getppid() == parent else "rank 0 is gone", lambda: None)
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)


def set_up_ranks(trainer: Trainer, timeout: timedelta) -> None:
    """Have `Launcher` in the place of Lightning's own, and ranks that wait for one another no longer than `timeout`.

    A timeout that the recipe's strategy names stays.
    """
    strategy: Any = trainer.strategy
    if type(strategy.launcher) is _SubprocessScriptLauncher:
        theirs = strategy.launcher
        strategy._launcher = Launcher(theirs.cluster_environment, theirs.num_processes, theirs.num_nodes)
    if getattr(strategy, "_timeout", None) == default_pg_timeout:
        strategy._timeout = timeout


def _watch(lost: Callable[[], str | None], clean_up: Callable[[], None]) -> None:
    """Look every so often whether another rank is lost; if so and this process still runs a while later, end it."""

    def look() -> None:
        while (what := lost()) is None:
            time.sleep(_EVERY)
        time.sleep(_GRACE)
        _log.error("%s, and this rank still waits for it; start the same command again to continue", what)
        clean_up()
        os._exit(1)  # the main thread may be deep in a collective operation, which nothing else would end

    threading.Thread(target=look, daemon=True, name="rank watch").start()


def _lost_child(children: list[subprocess.Popen[bytes]]) -> str | None:
    for rank, child in enumerate(children, start=1):
        if child.poll():
            return f"local rank {rank} (process {child.pid}) ended with code {child.returncode}"
    return None


def launched(trainer: Trainer) -> list[subprocess.Popen[bytes]]:
    """The other ranks, where `devices: 2` had Lightning start them from this process."""
    launcher = trainer.strategy.launcher
    return launcher.procs if isinstance(launcher, _SubprocessScriptLauncher) else []


def take_children(trainer: Trainer) -> list[subprocess.Popen[bytes]]:
    """The ranks that are `launched`, none a second time.

    The thread that watches them shares the list: out of it, one that leaves does not have this process killed.
    """
    started = launched(trainer)
    children = list(started)
    started.clear()
    return children


def end_ranks(children: list[subprocess.Popen[bytes]], grace: float = _GRACE) -> None:
    """Wait a while for other ranks to end, then kill those that do not."""
    until = time.monotonic() + grace
    for child in children:
        try:
            child.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
