"""Trying again: how an attempt to get a file fails, how many attempts are made, how long each is waited for."""

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
_jitter = random.Random()  # its own: waiting for a server does not move the random state of the run
_T = TypeVar("_T")
_LONGEST = 500  # characters of what happened
_REPORTED = 3  # failures in a row from which on the user is told of each
_WORTH = {"missing shards": 1, "refused shards": 1, "changed shards": 2, "damaged shards": 2}  # attempts, by cause
_FORGIVEN_AFTER = 120.0  # seconds for which a file that failed to the end is tried once only
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
_given_up: dict[str, float] = {}  # when a file failed to the end, by name, in this process


@dataclass(frozen=True)
class Patience:
    """Limits of trying again with a server that fails.

    Args:
        attempts: Failures one after another, none of which brought the file further, before it is given up.
        first_wait: Seconds after the first failure; doubled after each, and shortened at random by up to a half.
        longest_wait: Most seconds between two attempts, also where the server asks for more.
        timeout: Seconds for a connection, and for the next byte.
        window: Seconds in which a transfer brings `least_bytes`, or is stalled.
        least_bytes: Bytes, see `window`.
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
    """One attempt failed.

    Args:
        cause: The phrase under which it is counted: "missing shards", "unreachable shards", "stalled shards",
            "refused shards", "damaged shards", "changed shards" or "unreadable shards".
        text: What happened, without the name of the file; control characters are spelled, and the end is cut.
        attempts: Attempts that are worth making at this fault; by default as many as its cause is worth: one or two,
            or all that patience allows.
        wait: Seconds that the server asks to be left alone for.
    """

    def __init__(self, cause: str, text: str, *, attempts: int | None = None, wait: float = 0.0) -> None:
        super().__init__(shown(" ".join(text.split()))[:_LONGEST])
        self.cause = cause
        self.attempts = attempts or _WORTH.get(cause)
        self.wait = wait


def persist(attempt: Callable[[], _T], name: str, patience: Patience, progress: Callable[[], int] = lambda: 0) -> _T:
    """Call until it succeeds, with growing waits between failures.

    Args:
        attempt: Raises `Fault` when it fails.
        name: The file, as messages name it.
        patience: When to give up.
        progress: Returns the bytes had so far: failures that bring `least_bytes` more each are not counted.

    Raises:
        SourceError: With the name, the attempts and the last cause.
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
            say = _log.info if failures >= _REPORTED else _log.debug  # one reset among thousands of shards is no news
            say("%s: %s. Trying again in %.1f s.", name, fault, wait)
        time.sleep(wait)


def may_pass(error: OSError) -> bool:
    """Return whether the same may succeed a while later, as on a network disk whose server restarts."""
    return error.errno in _PASSING


def patiently(
    path: object, action: Callable[[], _T], patience: Patience = PATIENT, between: Callable[[], None] = lambda: None
) -> _T:
    """Do something with a file, and again with growing waits, as for files on servers, if an error may pass.

    A file that failed to the end is tried once only for the next two minutes: each of its samples would wait as long.

    Args:
        path: Names the file.
        action: Opens and reads it.
        patience: When to give up.
        between: Called after an error: closes what is open, as a stale handle stays stale.

    Raises:
        SourceError: If it is gone ("missing shards") or cannot be read ("unreadable shards").
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
