"""Tasks in a process of their own: one that hangs, crashes or breaks the GPU costs only itself."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from typing import Any

import torch

from benchmarks.measure import first_line

TaskFunction = Callable[..., Any]  # its arguments and its result are plain data


class Lost(Exception):
    """A task that gave no result, and the reason.

    Attributes:
        took_too_long: Whether it was ended at its limit.
    """

    took_too_long = False


class TookTooLong(Lost):
    took_too_long = True


class Isolated:
    """Run tasks one by one in a process that is forked from this one.

    The process is forked for the first task, and again after each task that it did not survive. It needs no time to
    import what is imported here. This process must not have used CUDA before, because a fork could not use it then.

    Args:
        set_up: Function that the new process calls first.
        tasks: Functions that can be run, by their place.
    """

    def __init__(self, set_up: Callable[[], None], tasks: Sequence[TaskFunction]) -> None:
        self._set_up, self._tasks = set_up, tasks
        self._process: ForkProcess | None = None
        self._connection: Connection[Any, Any] | None = None

    def run(self, number: int, limit_s: float, *arguments: Any) -> Any:
        """Run a task and return its result.

        Args:
            number: Place of the task.
            limit_s: Seconds after which the process is killed.
            *arguments: Plain data for the task.

        Raises:
            Lost: If the task raises, ends its process, or takes too long.
        """
        connection = self._connected()
        try:
            connection.send((number, arguments))
            if not connection.poll(limit_s):
                self.kill()
                raise TookTooLong(f"stopped after {limit_s:.0f} s")
            result, error, is_healthy = connection.recv()
        except (EOFError, OSError):
            raise Lost(f"its process ended with code {self.kill()}") from None
        if not is_healthy:
            self.kill()
        if error:
            raise Lost(error)
        return result

    def kill(self) -> int | None:
        """End the process at once and return its exit code, which is below 0 for a signal; None if there is none."""
        if self._process is None or self._connection is None:
            return None
        self._process.join(0.1)  # it may be ending by itself, with a code that tells why
        self._process.kill()
        self._process.join()
        self._connection.close()
        code, self._process, self._connection = self._process.exitcode, None, None
        return code

    def _connected(self) -> Connection[Any, Any]:
        if self._connection is None:
            context = multiprocessing.get_context("fork")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=self._serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
        return self._connection

    def _serve(self, connection: Connection[Any, Any]) -> None:
        """Run the tasks that arrive, until the other side closes."""
        if self._connection is not None:
            self._connection.close()  # otherwise this process would keep its own other side open
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which decides
        self._set_up()
        while True:
            try:
                number, arguments = connection.recv()
            except EOFError:
                return
            result, error = None, ""
            try:
                result = self._tasks[number](*arguments)
            except Exception as reason:  # a broken task must not stop the others
                traceback.print_exc()
                error = first_line(reason)
            connection.send((result, error, _gpu_is_healthy()))


def _gpu_is_healthy() -> bool:
    """Return False if an earlier kernel failed: every later call of its process then fails as well."""
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
