"""Recipes as people give them: the errors name the file, the line and the option."""

from pathlib import Path

import pytest

from ssmpretrain.commands.recipes import FOLDER
from ssmpretrain.recipe_files import check_recipe, check_value, read_recipe

GOOD = "model: {a: 1}\ntrainer:\n  max_epochs: 3\n"
FAULTS: dict[str, tuple[bytes, list[str]]] = {
    "twice at the top": (f"{GOOD}model: {{b: 2}}\n".encode(), [":4:", "model", "line 1"]),
    "twice below": (f"{GOOD}  devices: 1\n  max_epochs: 4\n".encode(), [":5:", "trainer.max_epochs", "line 3"]),
    "twice in one line": (b"a: {b: {c: 1, c: 2}}", [":1:", "a.b.c"]),
    "twice in a list": (b"a:\n- b: 1\n  b: 2\n", [":3:", "b", "line 2"]),
    "nested and with dots": (f"{GOOD}trainer.max_epochs: 4\n".encode(), [":4:", "trainer.max_epochs", "line 3"]),
    "twice behind an alias": (b"a: &x\n  b: 1\n  b: 2\nc: *x\n", [":3:", "b"]),
    "Latin-1": ("a: 1\n# réglage\n".encode("latin-1"), ["UTF-8", "line 2", "0xe9"]),
    "UTF-16": (GOOD.encode("utf-16"), ["UTF-16", "UTF-8"]),
    "checkpoint": (b"PK\x03\x04 archive/data.pkl", ["zip", "--ckpt_path"]),
    "old checkpoint": (b"\x80\x02}q\x00.", ["pickle"]),
    "shard": (b"a.jpg".ljust(257, b"\0") + b"ustar\0", ["tar archive", "--data.train"]),
    "list": (b"- a\n", ["by name", "a list"]),
    "word": (b"lots\n", ["by name"]),
    "nothing": (b"# a comment\n", ["by name", "nothing"]),
    "broken": (b"a: [1\nb: 2\n", [":2:", "not valid YAML"]),
    "tab": (b"a:\n\tb: 1\n", [":2:", "not valid YAML"]),
    "deep": (b"a: " + b"[" * 100_000, ["levels"]),
    "huge": (b"#" * (1 << 23), ["8,388,608 bytes"]),
    "two documents": (b"a: 1\n---\na: 2\n", ["not valid YAML"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_file_is_named_with_what_is_wrong_in_it(fault: str, tmp_path: Path) -> None:
    content, expected = FAULTS[fault]
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    for read in (read_recipe, check_recipe):
        with pytest.raises(ValueError, match=r"recipe\.yaml") as error:
            read(path)
        message = str(error.value)
        assert all(part in message for part in expected), message
        assert len(message) < 300


def test_what_yaml_allows_is_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    text = "\ufeffa: &x {b: 1}\nc: {<<: *x, d: 2}\ne: [*x, *x]\n1: f\n'1': g\n"
    path.write_text(text, encoding="utf-8")
    assert read_recipe(path) == {"a": {"b": 1}, "c": {"b": 1, "d": 2}, "e": [{"b": 1}] * 2, 1: "f", "1": "g"}
    check_value("a: 1")
    with pytest.raises(ValueError, match="depth here and in line 1"):
        check_value("{depth: 1, depth: 2}")


def test_a_folder_and_a_device_are_no_recipes(tmp_path: Path) -> None:
    for path in (tmp_path, Path("/dev/zero")):
        with pytest.raises(ValueError, match=f"{path}: a recipe is YAML"):
            check_recipe(path)
    check_recipe(tmp_path / "gone.yaml")  # the parser says that


def test_every_recipe_of_the_package_is_read() -> None:
    for path in FOLDER.glob("*.yaml"):
        assert {"model", "data", "trainer"} <= read_recipe(path).keys()
