"""Signals that ask a process to end, and the exit code of a run that ended with everything saved."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

STOPPED, INTERRUPTED = 75, 130  # 75 is EX_TEMPFAIL: start the same command again
Handler = Callable[[int, FrameType | None], None]
# Seconds after which the process is ended if the main thread stays in C code or some code swallowed `SystemExit`.
_TO_ANSWER, _TO_LEAVE = 5, 90


@contextmanager
def stopped_at_once() -> Iterator[None]:
    """Turn SIGTERM and SIGUSR1 within the block into `SystemExit(75)`, as Python turns SIGINT into `KeyboardInterrupt`.

    A process that waits in C code, for instance for other ranks, is ended with the same code. A process that leaves in
    this way, or by `Preemption`, ignores both signals from then on, because torchrun sends SIGTERM to leaving ranks.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    leave = _Leave()
    previous = install_handlers((signal.SIGTERM, signal.SIGUSR1), leave)
    try:
        with leave.insisting():
            yield
    except SystemExit as left:
        if left.code == STOPPED:
            previous = dict.fromkeys(previous, signal.SIG_IGN)
        raise
    finally:
        restore_handlers(previous)


def install_handlers(signals: Iterable[int], handler: Handler) -> dict[int, object]:
    """Install `handler` for `signals`, and return the former handlers. Outside the main thread this does nothing."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    owner = os.getpid()

    def handle(signum: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:  # ignore it in a forked child, until the child sets its own handlers
            handler(signum, frame)

    return {signum: signal.signal(signum, handle) for signum in signals}


def restore_handlers(previous: dict[int, object]) -> None:
    """Put back the handlers that `install_handlers` returned."""
    for signum, handler in previous.items():
        signal.signal(signum, handler if handler is not None else signal.SIG_DFL)  # type: ignore[arg-type]


def say(line: str) -> None:
    """Write a line to standard error. It is safe in a signal handler, which may have interrupted a print."""
    os.write(2, f"{line}\n".encode())


class _Leave:
    """Handler of signals that leaves at once."""

    def __init__(self) -> None:
        self._answered, self._left = threading.Event(), threading.Event()

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        self._answered.set()
        if not isinstance(sys.exc_info()[1], SystemExit):  # otherwise it is leaving already
            _say_stopped(signum)
            raise SystemExit(STOPPED)

    @contextmanager
    def insisting(self) -> Iterator[None]:
        """End the process if a signal arrives and the block does not end soon."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR1)}
        threading.Thread(target=self._insist, args=(reader, handlers), daemon=True).start()
        try:
            yield
        finally:
            self._left.set()
            signal.set_wakeup_fd(before)
            os.close(writer)

    def _insist(self, reader: int, handlers: dict[int, object]) -> None:
        with os.fdopen(reader, "rb", buffering=0) as signals:
            while number := signals.read(1):
                ours = number[0] in handlers and signal.getsignal(number[0]) is handlers[number[0]]
                if ours and not (self._answered.wait(_TO_ANSWER) and self._left.wait(_TO_LEAVE)):
                    _say_stopped(number[0])
                    _end_children()
                    os._exit(STOPPED)


def _end_children() -> None:
    """Send SIGTERM to the processes that this one started, such as the other ranks. It works on Linux only."""
    for tasks in Path("/proc/self/task").glob("*/children"):
        for child in tasks.read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGTERM)


def _say_stopped(signum: int) -> None:
    say(f"ssmpretrain: stopped by {signal.Signals(signum).name}; start the same command again")
