"""The top-level folders reach the package through links, and site-packages gets nothing but the package."""

import re
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


def imports(file: Path) -> list[str]:
    """Rooms of the package that a file imports from."""
    return re.findall(r"^\s*(?:from|import) ssmpretrain\.(\w+)", file.read_text(), flags=re.MULTILINE)


def test_rooms_import_only_what_lies_below_them() -> None:
    level = {"commands": 1, "objectives": 2, "callbacks": 2, "training": 3, "encoders": 4, "kernels": 5}
    wrong = []
    for room in level:
        for file in (ROOT / "ssmpretrain" / room).resolve().rglob("*.py"):
            upward = {other for other in level if other != room and level[other] <= level[room]} | {
                "cli",
                "trainer_cli",
            }
            if room != "commands":  # a command may bring data and models together
                upward.add("datamodules")
            wrong += [f"{room}/{file.name} -> {target}" for target in imports(file) if target in upward]
    for file in (ROOT / "datamodules").rglob("*.py"):
        wrong += [f"datamodules/{file.name} -> {target}" for target in imports(file) if target != "datamodules"]
    assert wrong == []
