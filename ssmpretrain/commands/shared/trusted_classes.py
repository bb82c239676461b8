"""Classes that a file names. An import runs code, and others may have written the file: import only trusted modules."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Sequence
from typing import Any

from ssmpretrain.base.errors import UserError

_CLASS_PATH = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+", re.ASCII)


def add_argument(parser: argparse._ActionsContainer, file: str = "the run's config.yaml") -> None:
    """Add `--trust`, which allows further classes that `file` names."""
    parser.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="MODULE",
        help=f"let {file} name classes of this module too; this runs the code of the module; may be repeated "
        "(default: only classes of ssmpretrain)",
    )


def import_modules(trusted: Sequence[str], *, where: str) -> None:
    """Import the modules that the user trusts, so that their classes are found.

    Raises:
        UserError: If a module cannot be imported.
    """
    for module in trusted:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(f"{where}: --trust names a module that can be imported; got {module} ({error}).") from error


def import_class(class_path: str, kind: type, *, room: str, trusted: Sequence[str], where: str, instead: str) -> Any:
    """Import the class that a file names, if it belongs to this package or to a module that the user trusts.

    Args:
        class_path: Full name of the class.
        kind: Required base class.
        room: Package of this project with such classes, e.g. "ssmpretrain.datamodules".
        trusted: Modules that the user trusts, including their submodules.
        where: Start of error messages: the command and the file.
        instead: Remedy in error messages: another way without the class.

    Raises:
        ValueError: If the class is not allowed, does not exist, or is no subclass of `kind`.
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
