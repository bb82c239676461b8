"""Repeated attempts to read a file from a server or a network disk: faults, number of attempts, and waits."""

import errno
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from ssmpretrain.base.errors import SourceError
from ssmpretrain.base.shown_names import shown

_log = logging.getLogger(__name__)
_jitter = random.Random()  # a separate generator, so that waiting does not change the random state of the run
_T = TypeVar("_T")
_LONGEST = 500  # largest number of characters in the text of a fault
_REPORTED = 3  # the user is told of each failure from the third one in a row on
_WORTH = {"missing shards": 1, "refused shards": 1, "changed shards": 2, "damaged shards": 2}  # attempts by cause
_FORGIVEN_AFTER = 120.0  # seconds during which a file that was given up is tried only once
_PASSING = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.EINTR,
    errno.EIO,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENOTCONN,
    errno.EREMOTEIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
}
_given_up: dict[str, float] = {}  # time at which this process gave a file up, by its name


@dataclass(frozen=True)
class Patience:
    """Limits for repeated attempts with a server or disk that fails.

    Args:
        attempts: Number of failures in a row, without progress in between, after which a file is given up.
        first_wait: Seconds to wait after the first failure. The wait doubles after each failure, and is shortened at
            random by up to a half.
        longest_wait: Largest number of seconds between two attempts, even if the server asks for more.
        timeout: Seconds to wait for a connection, and for the next byte.
        window: Seconds in which a transfer must bring `least_bytes`; otherwise it counts as stalled.
        least_bytes: Number of bytes that must arrive within `window`.
    """

    attempts: int = 8
    first_wait: float = 0.5
    longest_wait: float = 30.0
    timeout: float = 20.0
    window: float = 60.0
    least_bytes: int = 4 << 20


PATIENT = Patience()
BRIEF = Patience(attempts=4, first_wait=0.25, timeout=10.0, window=30.0)  # at the start of a run, where a person waits


class Fault(Exception):
    """Failure of one attempt.

    Args:
        cause: Phrase under which the failure is counted: "missing shards", "unreachable shards", "stalled shards",
            "refused shards", "damaged shards", "changed shards" or "unreadable shards".
        text: Description of the failure without the name of the file. Control characters are escaped, and a long text
            is cut.
        attempts: Largest number of attempts for this failure. None takes the number for its cause: 1 for missing and
            refused, 2 for changed and damaged, otherwise all that `Patience` allows.
        wait: Seconds that the server asks to wait.
    """

    def __init__(self, cause: str, text: str, *, attempts: int | None = None, wait: float = 0.0) -> None:
        super().__init__(shown(" ".join(text.split()))[:_LONGEST])
        self.cause = cause
        self.attempts = attempts or _WORTH.get(cause)
        self.wait = wait


def persist(attempt: Callable[[], _T], name: str, patience: Patience, progress: Callable[[], int] = lambda: 0) -> _T:
    """Call `attempt` until it succeeds, with growing waits between failures, and return its result.

    Args:
        attempt: The action; it raises `Fault` if it fails.
        name: Name of the file, used in messages.
        patience: Limits of the attempts.
        progress: Returns the number of bytes received so far. A failure after at least `least_bytes` new bytes starts
            the count of failures again.

    Raises:
        SourceError: If the file is given up. It has the name, the number of attempts and the last cause.
    """
    failures, total, reached = 0, 0, progress()
    while True:
        try:
            return attempt()
        except Fault as fault:
            total += 1
            if progress() - reached >= patience.least_bytes:
                failures, reached = 0, progress()
            failures += 1
            if failures >= min(patience.attempts, fault.attempts or patience.attempts):
                tried = f" ({total} attempts)" if total > 1 else ""
                raise SourceError(f"{name}: {fault}{tried}.", fault.cause) from fault
            wait = _wait(failures, fault.wait, patience)
            say = _log.info if failures >= _REPORTED else _log.debug  # a single reset needs no message
            say("%s: %s. Trying again in %.1f s.", name, fault, wait)
        time.sleep(wait)


def may_pass(error: OSError) -> bool:
    """Return whether an error may pass after a while, as on a network disk whose server restarts."""
    return error.errno in _PASSING


def patiently(
    path: object, action: Callable[[], _T], patience: Patience = PATIENT, between: Callable[[], None] = lambda: None
) -> _T:
    """Call an action on a local file, and repeat it with growing waits if the error may pass.

    For two minutes after a file was given up, it is tried only once. Otherwise each of its samples would wait again.

    Args:
        path: Path of the file, used in messages.
        action: Opens and reads the file.
        patience: Limits of the attempts.
        between: Called after an error to close the open file, because a stale handle would fail again.

    Returns:
        The result of the action.

    Raises:
        SourceError: If the file does not exist ("missing shards") or cannot be read ("unreadable shards").
    """

    def attempt() -> _T:
        try:
            return action()
        except FileNotFoundError:
            raise Fault("missing shards", "no such file") from None
        except OSError as error:
            between()
            attempts = None if may_pass(error) else 1
            raise Fault("unreadable shards", error.strerror or str(error), attempts=attempts) from error

    name = str(path)
    recent = time.monotonic() - _given_up.get(name, -_FORGIVEN_AFTER) < _FORGIVEN_AFTER
    try:
        return persist(attempt, name, replace(patience, attempts=1) if recent else patience)
    except SourceError as error:
        if error.cause == "unreadable shards" and not recent:
            _given_up[name] = time.monotonic()
        raise


def _wait(failures: int, asked: float, patience: Patience) -> float:
    wait: float = patience.first_wait * 2.0 ** (failures - 1) * _jitter.uniform(0.5, 1)
    return min(max(wait, asked), patience.longest_wait)
