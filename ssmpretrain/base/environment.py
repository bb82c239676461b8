"""Environment of a process: numbers of its launcher, such as LOCAL_RANK, and entry points of installed packages."""

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
    """Return the entry points by which installed packages add to this one, sorted.

    Args:
        group: Name of the group, such as "ssmpretrain.commands".
    """
    from importlib.metadata import entry_points  # takes tens of milliseconds; most processes do without

    return sorted(entry_points(group=group))


def package_of(point: EntryPoint) -> str:
    """Return the name of the package that has an entry point, or the entry point's value if that is unknown."""
    return point.dist.name if point.dist is not None else point.value
