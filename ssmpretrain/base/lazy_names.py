"""Public names of a folder that are imported from their modules when they are first asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, modules: Mapping[str, str], former: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` for the `__init__` of a folder whose modules take long to import.

    Args:
        package: Full name of the folder, its `__name__`.
        modules: Name of the module that holds each public name, relative to the folder.
        former: Full names of further modules, whose public names this folder had when it was one module.
    """

    def get(name: str) -> Any:
        if name not in modules:
            for module in () if name.startswith("_") else map(import_module, former):
                if name in vars(module):
                    return vars(module)[name]
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{modules[name]}"), name)

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return get, names
