"""Options that a command line gives twice. A parser silently takes the last value, so the user is told."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence

from ssmpretrain.base.environment import environment_number
from ssmpretrain.base.shown_names import shown_lines


def name_repeated(words: Sequence[str], repeatable: Collection[str] = ()) -> None:
    """Print a line for each option that is given two values. Of several ranks on a machine only the first prints.

    Args:
        words: The command line.
        repeatable: Options that may be given several times, such as `--config`. Options that append to a list, such as
            `--list+`, are always allowed.
    """
    for line in repeated_options(words, repeatable) if environment_number("LOCAL_RANK", 0) == 0 else ():
        print(shown_lines(line), file=sys.stderr)


def repeated_options(words: Sequence[str], repeatable: Collection[str] = ()) -> list[str]:
    """Return a line for each option that is given two values; arguments as in `name_repeated`."""
    given: dict[str, str] = {}
    lines = []
    for word, following in zip(words, [*words[1:], "--"], strict=False):
        if word == "--":
            break
        option, equals, value = word.partition("=")
        if not option.startswith("--") or option in repeatable:
            continue
        name = option.replace(".init_args.", ".").replace("-", "_")
        if name.endswith("+"):  # later options belong to the new element
            given = {one: told for one, told in given.items() if not one.startswith(f"{name[:-1]}.")}
        elif equals or not following.startswith("--"):
            value = (value if equals else following)[:80]
            if given.get(name, value) != value:
                lines.append(f"{option.lstrip('-')}: given twice, and the last counts: {value}, not {given[name]}")
            given[name] = value
    return lines
