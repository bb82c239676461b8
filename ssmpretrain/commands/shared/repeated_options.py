"""Repeated options: a command line that gives one twice, as a script and its user may; a parser takes the last."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence

from ssmpretrain.base.environment import environment_number
from ssmpretrain.base.shown_names import shown_lines


def name_repeated(words: Sequence[str], repeatable: Collection[str] = ()) -> None:
    """Print a line for each option that is given two values; of several ranks on a machine the first prints.

    Args:
        words: The command line.
        repeatable: Options that may be given several times, as `--config`; those that append, as `--list+`, always may.
    """
    for line in repeated_options(words, repeatable) if environment_number("LOCAL_RANK", 0) == 0 else ():
        print(shown_lines(line), file=sys.stderr)


def repeated_options(words: Sequence[str], repeatable: Collection[str] = ()) -> list[str]:
    """Return a line for each option that is given two values; arguments as `name_repeated`."""
    given: dict[str, str] = {}
    lines = []
    for word, following in zip(words, [*words[1:], "--"], strict=False):
        if word == "--":
            break
        option, equals, value = word.partition("=")
        if not option.startswith("--") or option in repeatable:
            continue
        name = option.replace(".init_args.", ".").replace("-", "_")
        if name.endswith("+"):  # options of the element that was appended before are now set of the next
            given = {one: told for one, told in given.items() if not one.startswith(f"{name[:-1]}.")}
        elif equals or not following.startswith("--"):
            value = (value if equals else following)[:80]
            if given.get(name, value) != value:
                lines.append(f"{option.lstrip('-')}: given twice, and the last counts: {value}, not {given[name]}")
            given[name] = value
    return lines
