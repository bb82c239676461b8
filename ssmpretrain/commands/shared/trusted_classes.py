"""Classes named in files that others may have written. An import runs code, so only trusted modules are imported."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Sequence
from typing import Any

from ssmpretrain.base.errors import UserError

_CLASS_PATH = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+", re.ASCII)


def add_argument(parser: argparse._ActionsContainer, file: str = "the run's config.yaml") -> None:
    """Add `--trust`; the classes are named in `file`."""
    parser.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="MODULE",
        help=f"let {file} name classes of this module too, whose code is run; may be repeated "
        "(default: classes of ssmpretrain alone)",
    )


def import_modules(trusted: Sequence[str], *, where: str) -> None:
    """Import the modules that the user trusts, so that their classes are found.

    Raises:
        UserError: If there is no such module.
    """
    for module in trusted:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(f"{where}: --trust names a module that can be imported; got {module} ({error}).") from error


def import_class(class_path: str, kind: type, *, room: str, trusted: Sequence[str], where: str, instead: str) -> Any:
    """Import the class that a file names, if it is ours or of a module that the user trusts.

    Args:
        class_path: Its name in full.
        kind: What it is a subclass of.
        room: The part of this package that such a class is in, as "ssmpretrain.datamodules".
        trusted: Modules whose classes the user allows, with all below them.
        where: The command and the file, to open the message.
        instead: What to do without such a class.

    Raises:
        ValueError: If it is not allowed, or no such class.
    """
    allowed = any(class_path.startswith(f"{module}.") for module in (room, *trusted))
    if not (_CLASS_PATH.fullmatch(class_path) and allowed):
        module = class_path.rpartition(".")[0] if _CLASS_PATH.fullmatch(class_path) else "MODULE"
        raise UserError(
            f"{where} may name classes of {room} alone, as any other would run its code; got {class_path[:200]!r}. "
            f"{instead}; or where you know that code and trust it, add --trust {module}."
        )
    module, _, name = class_path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        found = None
    if isinstance(found, type) and issubclass(found, kind):
        return found
    raise UserError(f"{where} names a {kind.__name__} that can be imported; got {class_path}. {instead}.")
