"""The top-level folders reach the package through links, and site-packages gets nothing but the package."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest
from setuptools import find_namespace_packages

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("folder", ["kernels", "datamodules", "recipes"])
def test_top_level_folder_is_linked_into_the_package(folder: str) -> None:
    link = ROOT / "ssmpretrain" / folder
    assert link.is_symlink(), f"{link} is not a link: check out again with core.symlinks=true"
    assert link.resolve() == ROOT / folder


def test_only_ssmpretrain_is_installed_and_all_of_it() -> None:
    packages = find_namespace_packages(str(ROOT), include=["ssmpretrain*"])
    assert {name.split(".")[0] for name in packages} == {"ssmpretrain"}
    for name in ("kernels.native", "kernels.selective_scan", "datamodules", "recipes", "encoders", "objectives"):
        assert f"ssmpretrain.{name}" in packages


def test_kernels_is_no_package_of_its_own() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


# A room imports only rooms with a higher number; those that share one do not import each other.
LEVELS = {
    "cli": 0, "run": 1, "commands": 1, "objectives": 2, "callbacks": 2, "evaluation": 3, "training": 3, "encoders": 4,
    "kernels": 5, "base": 6,
}  # fmt: skip
WITH_DATA = {"cli", "run", "commands"}  # rooms that bring models and data together


def modules() -> dict[str, Path]:
    """Modules of the package by name, those behind links too."""
    package = ROOT / "ssmpretrain"
    files = [
        *package.rglob("*.py"),
        *(file for link in ("kernels", "datamodules") for file in (package / link).rglob("*.py")),
    ]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


MODULES = modules()


def imports(module: str) -> set[str]:
    """Modules of ours that one imports, also within functions; not those that only type checkers read."""
    found = set()
    waiting: list[ast.AST] = [ast.parse(MODULES[module].read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
                base = f"{package}.{base}".rstrip(".")
            found |= {f"{base}.{name.name}" if f"{base}.{name.name}" in MODULES else base for name in node.names}
        waiting += ast.iter_child_nodes(node)
    return {name for name in found if name in MODULES}


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_rooms_import_only_what_lies_below_them() -> None:
    wrong = []
    for module in MODULES:
        room = room_of(module)
        for target in imports(module):
            other = room_of(target)
            if other == room or "" in (room, other):
                continue
            if room == "datamodules":
                allowed = other == "base"
            elif other == "datamodules":
                allowed = room in WITH_DATA
            else:
                allowed = LEVELS.get(room, -1) < LEVELS.get(other, -1)
            if not allowed:
                wrong.append(f"{module} -> {target}")
    assert sorted(wrong) == []


# Likewise inside datamodules, where "" holds the public data modules.
DATA_LEVELS = {
    "synthetic": 0, "dense": 1, "": 2, "splits": 3, "order": 4, "shards": 4, "targets": 5, "decoding": 6, "remote": 6,
    "labels": 7, "tar": 7, "faults": 8, "files": 8,
}  # fmt: skip


def data_folder_of(module: str) -> str | None:
    """The folder of datamodules that a module lies in; None if it lies elsewhere, or only hands names on."""
    parts = module.split(".")
    if parts[:2] != ["ssmpretrain", "datamodules"] or MODULES[module].name == "__init__.py":
        return None
    return parts[2] if len(parts) > 3 else ""


def test_folders_of_datamodules_import_only_what_lies_below_them() -> None:
    wrong = []
    for module in MODULES:
        for target in imports(module):
            folder, other = data_folder_of(module), data_folder_of(target)
            if folder is None or other is None or folder == other:
                continue
            if DATA_LEVELS[folder] >= DATA_LEVELS[other]:
                wrong.append(f"{module} -> {target}")
    assert sorted(wrong) == []


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other by imports (Tarjan's strongly connected components)."""
    found: list[list[str]] = []
    numbers: dict[str, int] = {}
    lowest: dict[str, int] = {}
    path: list[str] = []

    def visit(module: str) -> None:
        numbers[module] = lowest[module] = len(numbers)
        path.append(module)
        for target in graph[module]:
            if target not in numbers:
                visit(target)
            if target in path:
                lowest[module] = min(lowest[module], lowest[target])
        if lowest[module] == numbers[module]:
            place = path.index(module)
            group = path[place:]
            del path[place:]
            if len(group) > 1 or module in graph[module]:
                found.append(sorted(group))

    for module in graph:
        if module not in numbers:
            visit(module)
    return found


def test_a_circle_of_imports_is_found() -> None:
    graph = {"a": {"b"}, "b": {"c", "e"}, "c": {"d"}, "d": {"b"}, "e": set(), "f": {"f", "e"}}
    assert sorted(circles(graph)) == [["b", "c", "d"], ["f"]]


def test_no_module_imports_itself_in_a_circle() -> None:
    assert circles({module: imports(module) for module in MODULES}) == []


def test_no_folder_has_more_than_about_fifteen_modules() -> None:
    counts = Counter(file.parent for file in MODULES.values() if file.name != "__init__.py")
    assert {str(folder): count for folder, count in counts.items() if count > 15} == {}


def folders_in_picture() -> set[str]:
    """Folders in the tree of docs/design.md."""
    picture = (ROOT / "docs" / "design.md").read_text().split("```")[1]
    found, path = set[str](), list[str]()
    for line in picture.strip().splitlines():
        name = line.split()[0]
        path = [*path[: (len(line) - len(line.lstrip())) // 2], name.rstrip("/")]
        found.add("/".join(path))
    return found


def test_the_picture_in_the_documentation_is_that_of_the_folders() -> None:
    real = {file.parent.resolve().relative_to(ROOT).as_posix() for file in MODULES.values()}
    real |= {"recipes", "tests", "benchmarks", "docs", "examples", "kernels"}
    drawn = folders_in_picture()
    assert drawn <= real
    # A new encoder family or operation edits no other file; the picture may follow later.
    assert {folder for folder in real - drawn if not re.match(r"ssmpretrain/encoders/\w+|kernels/\w+", folder)} == set()


def test_what_test_quick_leaves_out_exists() -> None:
    files = list((ROOT / "tests").rglob("test_*.py"))
    known = {file.stem for file in files} | {
        name for file in files for name in re.findall(r"^def (test_\w+)\(", file.read_text(), re.MULTILINE)
    }
    lines = (ROOT / "tests" / "not_quick.txt").read_text().splitlines()
    assert {line for line in lines if line and not line.startswith("#")} - known == set()
