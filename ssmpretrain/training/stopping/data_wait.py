"""Batches that never arrive: a run that waits for data and gets a stop signal still saves and leaves."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ssmpretrain.base import ranks
from ssmpretrain.base.lightning_private import watch_fetching

T = TypeVar("T")
_PATIENCE = 5.0  # seconds that a batch may still take after the signal
_TO_WAKE = 5.0  # seconds in which the main thread must react; otherwise it is stuck in a system call
_TO_SAVE = 120.0  # seconds that a rank waits for the rank that saves
_EVERY = 0.2  # seconds between two checks
_CLAIMED, _SAVED = "stop/claimed", "stop/saved"  # keys in the store through which the ranks met


class DataWait:
    """Watch whether the main thread waits for a batch. After a stop signal, save and leave if no batch arrives.

    While the main thread waits for a batch, training stands between two steps. Some seconds after a signal, a second
    signal wakes the main thread, and its handler saves and leaves. If the second signal does not wake the thread, e.g.
    during a read from a server that is gone, another thread saves the state and ends the process.

    With several ranks, the first rank that waits saves alone. The other ranks wait for data too, or for a collective
    operation that never ends. They end as soon as the first rank has saved.

    Args:
        save: Saves the run on this rank alone, without communication.
        pass_on: Sends the signal to the ranks that this process started, because they may not have received it.
        end: Reports the signal and ends the process; used if the main thread does not wake up.

    """

    def __init__(self, save: Callable[[], None], pass_on: Callable[[int], None], end: Callable[[int], None]) -> None:
        self._save, self._pass_on, self._end = save, pass_on, end
        self._due = False  # whether this object has sent the second signal
        self._since: float | None = None  # time since which the main thread waits for a batch
        self._moving = threading.Lock()  # held while the main thread must not continue
        self._woken, self._over = threading.Event(), threading.Event()
        self._listening: tuple[int, int] | None = None  # descriptor for signals, and the former one

    def __deepcopy__(self, memo: object) -> DataWait:
        return self  # signals belong to the process; callbacks of Lightning may copy a module with its trainer

    def watch(self, loop: Any) -> None:
        """Record the times at which a loop of Lightning waits for a batch."""
        watch_fetching(loop, self._ask, self._got)

    def each(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield `batches`, and record the times of waiting, for a loop outside Lightning."""
        iterator = iter(batches)
        while True:
            self._ask()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            finally:
                self._got()
            yield batch

    def listen(self, signals: Collection[int]) -> None:
        """Watch for signals from now on, even while the main thread runs C code and cannot handle them."""
        if self._listening is None and threading.current_thread() is threading.main_thread():
            reader, writer = os.pipe()
            os.set_blocking(writer, False)
            self._listening = writer, signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            threading.Thread(target=self._hear, args=(reader, signals), daemon=True, name="data wait").start()

    def over(self) -> None:
        """Stop watching, because the run has ended."""
        self._over.set()
        if self._listening is not None:
            (writer, before), self._listening = self._listening, None
            signal.set_wakeup_fd(before)
            os.close(writer)

    def answer(self) -> bool | None:
        """Return whether the handler of a signal should leave; None if the signal came from outside."""
        due, self._due = self._due, False
        return self._since is not None if due else None

    def leave(self, signum: int) -> None:
        """Save on one of the waiting ranks, because of the signal `signum`."""
        self._woken.set()
        if _is_at_rest() and _is_first():
            self._save()
            _note_saved(signum)
        else:
            _wait_for_saved()
        _kill_workers()

    def _ask(self) -> None:
        self._since = time.monotonic()

    def _got(self) -> None:
        with self._moving:
            self._since = None

    def _hear(self, reader: int, signals: Collection[int]) -> None:
        with os.fdopen(reader, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                if number[0] in signals:
                    self._look(number[0])
                    return

    def _look(self, signum: int) -> None:
        """Check from now on whether the main thread waits in vain."""
        begun, store = time.monotonic(), _store()
        if self._over.wait(_PATIENCE):
            return
        self._pass_on(signum)
        while not self._over.wait(_EVERY):
            since = self._since
            if since is not None and time.monotonic() - max(since, begun) >= _PATIENCE:
                self._wake(signum)
            elif store is not None and _has(store, _SAVED):  # this rank waits for the others
                if not self._over.wait(_TO_WAKE):
                    self._end(signum)
                return

    def _wake(self, signum: int) -> None:
        """Let the main thread leave. If it does not react, save and leave from this thread."""
        self._due = True
        signal.pthread_kill(threading.main_thread().ident or 0, signum)
        if self._woken.wait(_TO_WAKE):
            self._over.wait()
            return
        with self._moving:
            if self._since is not None and not self._woken.is_set():
                with contextlib.suppress(OSError):  # writing failed; an earlier checkpoint remains
                    self.leave(signum)
                self._end(signum)
        self._due = False


def _store() -> Any:
    return dist.distributed_c10d._get_default_store() if ranks.world() > 1 else None


def _has(store: Any, key: str) -> bool:
    try:
        return bool(store.check([key]))
    except (RuntimeError, OSError):
        return True  # the rank that keeps the store has left


def _is_at_rest() -> bool:
    """Return whether the GPU of this rank has finished its work, so that the weights belong to the last step."""
    return ranks.world() == 1 or not torch.cuda.is_available() or torch.cuda.current_stream().query()


def _is_first() -> bool:
    """Return whether this rank is the first that wants to save."""
    store = _store()
    return store is None or int(store.add(_CLAIMED, 1)) == 1


def _note_saved(signum: int) -> None:
    if (store := _store()) is not None:
        store.set(_SAVED, str(signum))


def saved_by_another() -> int:
    """Return the signal after which another rank saved and left; 0 if no rank did."""
    try:
        store = _store()
        return int(store.get(_SAVED)) if store is not None and store.check([_SAVED]) else 0
    except (RuntimeError, OSError):  # the rank that keeps the store has left
        return 0


def _wait_for_saved() -> None:
    until, store = time.monotonic() + _TO_SAVE, _store()
    while not _has(store, _SAVED) and time.monotonic() < until:
        time.sleep(_EVERY)


def _kill_workers() -> None:
    """Kill the workers of the loader, which may hang. Otherwise this process would wait for them at its end."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises when a worker is killed
    for child in multiprocessing.active_children():
        with contextlib.suppress(OSError):
            os.kill(child.pid or 0, signal.SIGKILL)
