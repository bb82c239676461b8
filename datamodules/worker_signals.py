"""Signals in the worker processes of a loader: the run decides when they end, not who signals the whole job."""

import os
import signal
import threading


def ignore_signals(worker_id: int) -> None:
    """Leave SIGINT, SIGUSR1 and SIGTERM to the main process, so that the batches it still needs arrive.

    A SIGTERM of the main process itself ends the worker, as when it leaves; so does its death, within seconds. Give
    this to a DataLoader as `worker_init_fn`.

    Args:
        worker_id: The loader's number of the worker; without effect.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS, where nobody can tell who sent a signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # in threads that begin later too
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = os.getppid()
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)
