"""Signals that ask a process to end, and the exit code that says it did so with nothing lost."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

STOPPED, INTERRUPTED = 75, 130  # 75 is EX_TEMPFAIL: start the same command again
Handler = Callable[[int, FrameType | None], None]


@contextmanager
def stopped_at_once() -> Iterator[None]:
    """Let SIGTERM and SIGUSR1 leave the block by `SystemExit(75)`, as SIGINT does by `KeyboardInterrupt`."""
    previous = take_over((signal.SIGTERM, signal.SIGUSR1), _leave)
    try:
        yield
    finally:
        give_back(previous)


def take_over(signals: Iterable[int], handler: Handler) -> dict[int, object]:
    """Handle `signals`, in the main thread, where alone that is possible; what handled them before."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    owner = os.getpid()

    def handle(signum: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:  # not in a forked child that has not set its own yet
            handler(signum, frame)

    return {signum: signal.signal(signum, handle) for signum in signals}


def give_back(previous: dict[int, object]) -> None:
    """Let signals be handled as before `take_over`."""
    for signum, handler in previous.items():
        signal.signal(signum, handler if handler is not None else signal.SIG_DFL)  # type: ignore[arg-type]


def say(line: str) -> None:
    """Write a line to standard error from a signal handler, which may have interrupted a print."""
    os.write(2, f"{line}\n".encode())


def _leave(signum: int, frame: FrameType | None) -> None:
    if isinstance(sys.exc_info()[1], SystemExit):
        return  # told again on the way out
    say(f"ssmpretrain: stopped by {signal.Signals(signum).name}; start the same command again")
    raise SystemExit(STOPPED)
