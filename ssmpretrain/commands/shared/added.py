"""Commands that other installed packages add, by an entry point of the group `ssmpretrain.commands`."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from ssmpretrain.base.errors import UserError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

_GROUP = "ssmpretrain.commands"


def added_commands() -> dict[str, str]:
    """Return the names of the added commands, and the package that each comes from; nothing of theirs is imported."""
    return {point.name: f"from the package {_package(point)}" for point in _entry_points()}


def added_command(name: str) -> tuple[ModuleType, str] | None:
    """Import the module of an added command.

    Returns:
        The module, and the first line of its docstring, without a full stop; None if no package adds the name.

    Raises:
        UserError: If two packages add the name, or the module lacks `add_arguments(parser)` or `run(args)`.
    """
    points = [point for point in _entry_points() if point.name == name]
    if not points:
        return None
    if len(points) > 1:
        packages = " and ".join(_package(point) for point in points)
        raise UserError(f"{name}: one package adds a command; got {packages}. Uninstall one of them.")
    module = points[0].load()
    if missing := [part for part in ("add_arguments", "run") if not callable(getattr(module, part, None))]:
        raise UserError(
            f"{name}: a command is a module with add_arguments(parser) and run(args); {points[0].value} of the package "
            f"{_package(points[0])} has no {missing[0]}. Correct its entry point."
        )
    lines = (module.__doc__ or "").strip().splitlines() or [f"a command of the package {_package(points[0])}"]
    return module, lines[0].rstrip(".")


def _entry_points() -> list[EntryPoint]:
    from importlib.metadata import entry_points  # 30 ms that commands of our own do not wait

    return sorted(entry_points(group=_GROUP))


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value
