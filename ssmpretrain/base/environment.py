"""Surroundings of a process: numbers that launchers leave in environment variables, and installed packages."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ssmpretrain.base.errors import UserError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


def environment_number(name: str, default: int) -> int:
    """Return the whole number in an environment variable, or `default` if it is not set.

    Raises:
        UserError: If the variable holds something else.
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal() or len(text) > 18:
        raise UserError(
            f"environment: {name} is a whole number that a launcher sets; got {text[:40]!r}. "
            "Unset it, or start through torchrun or srun."
        )
    return int(text)


def entry_points_of(group: str) -> list[EntryPoint]:
    """Return the entry points of a group, sorted; nothing that they name is imported."""
    from importlib.metadata import entry_points  # tens of milliseconds that nobody waits who needs none

    return sorted(entry_points(group=group))


def package_of(point: EntryPoint) -> str:
    """Return the name of the package that an entry point comes from, or else what the entry point says."""
    return point.dist.name if point.dist is not None else point.value
