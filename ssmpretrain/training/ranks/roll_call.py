"""The roll call of ranks: if ranks are lost, the others find out which ones, and one rank reports them in one line."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from ssmpretrain.base.errors import UserError

_ROLL_CALL = 3.0  # seconds to answer; a rank that is alive and waits for the lost one answers at once
_MAX_LISTED = 5
# Error texts of gloo and NCCL when a rank has left or does not come; they have no exception classes for this.
_LOST = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|Timed out waiting|Socket Timeout|Application timeout|"
    r"remote process exited|NCCL communicator was aborted|Watchdog caught collective|failed to recv|"
    r"Gloo|gloo/transport"
)


class RankLost(UserError):
    """Another rank was killed, has crashed or hangs. One rank carries the message; on all others it is empty."""

    exit_code = 1


class LostRanks(Callback):
    """Name the ranks that are gone when a collective operation fails because of them.

    At the start every rank writes its host and process id into the store through which the ranks met. If a rank cannot
    reach another, all remaining ranks answer a roll call in the store, and the first of them names those that did not
    answer. The exception then has a `RankLost` as its cause.
    """

    def __init__(self) -> None:
        self._store: Any = None
        self._rank = self._world = self._local_rank = 0
        self._first = ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size > 1:
            self._rank, self._world, self._local_rank = trainer.global_rank, trainer.world_size, trainer.local_rank
            self._store = dist.distributed_c10d._get_default_store()
            self._store.set(f"who/{self._rank}", f"{socket.gethostname()}, process {os.getpid()}")
            self._first = self._store.get("who/0").decode()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._store is not None and _LOST.search(str(exception)) and exception.__cause__ is None:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends this rank too; let it finish its message
            exception.__cause__ = RankLost(self._roll_call(trainer.global_step))

    def _roll_call(self, step: int) -> str:
        """Return the message of this rank; an empty text if another rank reports."""
        try:
            self._store.set(f"here/{self._rank}", "")
            missing = self._missing()
            if 0 < len(missing) < self._world and self._rank == min(set(range(self._world)) - set(missing)):
                who = {rank: self._store.get(f"who/{rank}").decode() for rank in missing[:_MAX_LISTED]}
                return lost_message(who, len(missing), step)
        except (RuntimeError, OSError):  # the store is with rank 0, unless torchrun keeps it
            return lost_message({0: self._first}, 1, step) if self._rank == 1 or self._local_rank == 0 else ""
        return "" if missing else f"the ranks waited in vain for one another at step {step:,}, yet all are there."

    def _missing(self) -> list[int]:
        """Return the ranks that do not answer."""
        until = time.monotonic() + _ROLL_CALL
        missing = list(range(self._world))
        while missing and time.monotonic() < until:
            missing = [rank for rank in missing if not self._store.check([f"here/{rank}"])]
            time.sleep(0.1)
        return missing


def lost_message(who: dict[int, str], count: int, step: int) -> str:
    """Return a message that names the lost ranks, their hosts, and the remedy.

    Args:
        who: Host and process of the first few lost ranks, by rank.
        count: Number of lost ranks.
        step: Optimizer step of the remaining ranks.
    """
    listed = ", ".join(f"{rank} ({where})" for rank, where in who.items()) + (", ..." if count > len(who) else "")
    ranks = f"rank {listed} does" if count == 1 else f"{count} ranks do"
    tail = "" if count == 1 else f": {listed}"
    return (
        f"{ranks} not answer any more at step {step:,}: killed, crashed or stuck{tail}. Look for its own message above "
        "or in the system's log (out of memory?). Start the same command again to continue from the last checkpoint."
    )
