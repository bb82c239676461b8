"""Run one command: find its module, here or in another installed package, and parse its arguments.

A command is a module with `add_arguments(parser)` and `run(args)`, which returns the exit code. Another package adds a
command by an entry point of the group `ssmpretrain.commands`. The name of the entry point is the name of the command.
"""

from __future__ import annotations

import argparse
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import NoReturn

from ssmpretrain.base.environment import entry_points_of, package_of
from ssmpretrain.base.errors import UserError
from ssmpretrain.base.wording import nearest
from ssmpretrain.commands.shared.repeated_options import name_repeated

_GROUP = "ssmpretrain.commands"
_LONG = 300  # characters that are kept of a message of argparse


def run_command(words: Sequence[str], ours: Mapping[str, str], others: Iterable[str] = ()) -> int:
    """Run the command that the first word names, with the arguments after it, and return its exit code.

    Args:
        words: The command line; at least one word.
        ours: Commands of this package by name (modules of `ssmpretrain.commands`), each with a description.
        others: Further names of commands, to suggest for a mistyped name.

    Raises:
        UserError: If there is no such command, or an argument is wrong.
    """
    name, *rest = words
    if name in ours:
        module, what = import_module(f"ssmpretrain.commands.{name}"), ours[name]
    elif found := _added_command(name):
        module, what = found
    else:
        known = [*others, *ours, *added_commands({*others, *ours})]
        raise UserError(f"{name}: no such command. {nearest(name, known, 'Commands')}")
    parser = _Parser(prog=f"ssmpretrain {name}", description=f"{what[0].upper()}{what[1:]}.")
    module.add_arguments(parser)
    name_repeated(rest, parser.options_that_append())
    known_options = parser.options()
    args = parser.parse_args([_as_known(word, known_options) for word in rest])
    _check_whole_numbers(name, args)
    return int(module.run(args) or 0)


def added_commands(ours: Container[str]) -> dict[str, str]:
    """Return the names of commands that other packages add, each with its package, without importing them.

    Args:
        ours: Names of commands of this package, which no other package can take.
    """
    points = (point for point in entry_points_of(_GROUP) if point.name not in ours)
    return {point.name: f"from the package {package_of(point)}" for point in points}


def _added_command(name: str) -> tuple[ModuleType, str] | None:
    """Import the module of an added command, and return it with the first line of its docstring."""
    points = [point for point in entry_points_of(_GROUP) if point.name == name]
    if not points:
        return None
    if len(points) > 1:
        packages = " and ".join(package_of(point) for point in points)
        raise UserError(f"{name}: one package adds a command; got {packages}. Uninstall one of them.")
    try:
        module = points[0].load()
    except Exception as error:
        raise UserError(
            f"{name}: the command of the package {package_of(points[0])} cannot be imported from {points[0].value} "
            f"({type(error).__name__}: {error}). Correct or uninstall the package."
        ) from error
    if missing := [part for part in ("add_arguments", "run") if not callable(getattr(module, part, None))]:
        raise UserError(
            f"{name}: a command is a module with add_arguments(parser) and run(args); {points[0].value} of the package "
            f"{package_of(points[0])} has no {missing[0]}. Correct its entry point."
        )
    lines = (module.__doc__ or "").strip().splitlines() or [f"a command of the package {package_of(points[0])}"]
    return module, lines[0].rstrip(".")


class _Parser(argparse.ArgumentParser):
    """Parser that raises a `UserError` of one line; sub-commands use the same class."""

    def options(self) -> set[str]:
        """Return the options of the command and of its sub-commands."""
        return {option for action in self._everything() for option in action.option_strings}

    def options_that_append(self) -> set[str]:
        """Return the options that append to a list, which may be given several times."""
        kinds = (argparse._AppendAction, argparse._ExtendAction)
        return {option for one in self._everything() if isinstance(one, kinds) for option in one.option_strings}

    def error(self, message: str) -> NoReturn:
        message = message if len(message) <= _LONG else f"{message[:_LONG]}..."
        raise UserError(f"{message}. See `{self.prog} --help`.")

    def _everything(self) -> Iterator[argparse.Action]:
        for action in self._actions:
            yield action
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    yield from parser._everything()


def _as_known(word: str, known: Container[str]) -> str:
    """Write `--image_size` as `--image-size`. The options of the trainer use `_`, so both forms are accepted."""
    option, equals, value = word.partition("=")
    return word if option in known or not word.startswith("--") else option.replace("_", "-") + equals + value


def _check_whole_numbers(command: str, args: argparse.Namespace) -> None:
    """Raise if any option has a whole number of more than 64 bits, which torch and NumPy cannot hold."""
    for name, value in vars(args).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and not -(2**63) <= number < 2**63:
                raise UserError(
                    f"{command}: --{name.replace('_', '-')} is a number of at most 64 bits; got {str(number)[:40]}. "
                    "Give a smaller one."
                )
