"""Time limits of a run, in the forms that the trainer's `max_time` takes."""

from __future__ import annotations

from datetime import timedelta

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Timer

from ssmpretrain.base.errors import UserError

TimeLimit = str | timedelta | dict[str, int] | None


def seconds_of(max_time: TimeLimit) -> float | None:
    """Return a time limit in seconds, or None for no limit.

    Args:
        max_time: "DD:HH:MM:SS", a `timedelta`, the arguments of a `timedelta` by name, or None.

    Raises:
        UserError: If `max_time` is not a time above 0.
    """
    try:
        seconds = Timer(max_time).time_remaining()
    except (MisconfigurationException, ValueError, TypeError, OverflowError) as error:
        raise _no_time(max_time) from error
    if seconds is not None and not seconds > 0:
        raise _no_time(max_time)
    return seconds


def _no_time(max_time: object) -> UserError:
    return UserError(
        f"trainer: max_time is above 0, as DD:HH:MM:SS or as {{hours: 4}}; got {max_time}. Correct it in the recipe "
        "or on the command line."
    )
