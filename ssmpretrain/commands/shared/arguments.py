"""The parser of a command's arguments: complaints in one line, `_` and `-` alike, numbers that a machine can hold."""

from __future__ import annotations

import argparse
from collections.abc import Container, Iterator, Sequence
from typing import NoReturn

from ssmpretrain.base.errors import UserError

_LONG = 300  # characters of argparse's that are passed on


class CommandParser(argparse.ArgumentParser):
    """The parser that a command adds its arguments to; it is made with `prog="ssmpretrain COMMAND"`."""

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse the words after the command's name.

        Raises:
            UserError: If an argument is missing, unknown or malformed, or a whole number has more than 64 bits.
        """
        known = {option for action in self._everything() for option in action.option_strings}
        args = self.parse_args([_as_known(word, known) for word in words])
        _check_whole_numbers(self.prog.split()[-1], args)
        return args

    def repeatable(self) -> set[str]:
        """Return the options that add to a list, and so may be given several times."""
        adding = (argparse._AppendAction, argparse._ExtendAction)
        return {
            option for action in self._everything() if isinstance(action, adding) for option in action.option_strings
        }

    def _everything(self) -> Iterator[argparse.Action]:
        """Yield the arguments of the command and of its sub-commands."""
        for action in self._actions:
            yield action
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    yield from parser._everything()

    def error(self, message: str) -> NoReturn:
        """Raise argparse's complaint as an error of ours."""
        message = message if len(message) <= _LONG else f"{message[:_LONG]}..."
        raise UserError(f"{message}. See `{self.prog} --help`.")


def _as_known(word: str, known: Container[str]) -> str:
    """Write `--image_size` as `--image-size`: the trainer's options have `_`, and nobody should have to remember."""
    option, equals, value = word.partition("=")
    return word if option in known or not word.startswith("--") else option.replace("_", "-") + equals + value


def _check_whole_numbers(command: str, args: argparse.Namespace) -> None:
    """Refuse a number that the arithmetic of torch and NumPy cannot hold, whatever the option."""
    for name, value in vars(args).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and not -(2**63) <= number < 2**63:
                raise UserError(
                    f"{command}: --{name.replace('_', '-')} is a number of at most 64 bits; got {str(number)[:40]}. "
                    "Give a smaller one."
                )
