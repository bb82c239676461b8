"""Recipes as people give them: the errors name the file, the line and the option."""

from pathlib import Path

import pytest
import yaml

from ssmpretrain.base.yaml_files import check_recipe, check_value, read_recipe
from ssmpretrain.commands.recipes import FOLDER

GOOD = "model: {a: 1}\ntrainer:\n  max_epochs: 3\n"


def _bomb(form: str, each: int = 10, levels: int = 10) -> bytes:
    """A mapping in which each value names the one before it, `each` times."""
    lines = ["v0: &v0 [1]"]
    lines += [f"v{i}: &v{i} {form.format(', '.join([f'*v{i - 1}'] * each))}" for i in range(1, levels + 1)]
    return "\n".join(lines).encode()


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
    "UTF-16 without a mark": (GOOD.encode("utf-16-be"), ["in UTF-16", "as UTF-8"]),
    "UTF-32": (GOOD.encode("utf-32"), ["in UTF-32"]),
    "UTF-32 without a mark": (GOOD.encode("utf-32-le"), ["in UTF-32"]),
    "zeros": (b"a: 1\nb: \0\n", ["zero byte in line 2"]),
    "endless list": (b"x: 1\na: &a [*a]\n", [":2:", "inside what it names"]),
    "endless mapping": (b"a: &a\n  b: [{c: *a}]\n", [":1:", "inside what it names"]),
    "endless merge": (b"a: &a {<<: *a}\n", [":1:", "inside what it names"]),
    "bomb": (_bomb("[{}]"), ["aliases", "100,000"]),
    "bomb of mappings": (_bomb("{{k: [{}]}}"), ["aliases"]),
    "deep by aliases": (_bomb("[{}]", each=1, levels=200), ["levels", "aliases"]),
    "long number": (b"a:\n- b: -" + b"9" * 5000, [":2:", "64 bits", "5,001"]),
    "long number in binary": (b"a: 0b" + b"1" * 20_000, ["64 bits"]),
    "NUL in a path": (b'x: 1\nrun_dir: "a\\0b"\n', [":2:", "NUL"]),
    "NUL in a list": (b'data: {train: [a, "\\x00"]}\n', [":1:", "NUL"]),
    "NUL in a name": (b'"a\\u0000": 1\n', ["NUL"]),
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
    check_value(f"[{'7,' * 101_000}]")  # long, but written out
    with pytest.raises(ValueError, match="depth here and in line 1"):
        check_value("{depth: 1, depth: 2}")


@pytest.mark.parametrize("text", ("&a [*a]", "[1, &a {b: *a}]", '"a\\0b"', "7" * 5000, _bomb("[{}]").decode()))
def test_a_value_that_cannot_be_meant_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="; got ") as error:
        check_value(text)
    assert len(str(error.value)) < 300


def test_a_value_of_too_many_levels_is_no_yaml() -> None:
    with pytest.raises(yaml.YAMLError, match="levels"):
        check_value("[" * 5000)


def test_a_folder_and_a_device_are_no_recipes(tmp_path: Path) -> None:
    for path in (tmp_path, Path("/dev/zero")):
        with pytest.raises(ValueError, match=f"{path}: a recipe is YAML"):
            check_recipe(path)
    check_recipe(tmp_path / "gone.yaml")  # the parser says that


def test_every_recipe_of_the_package_is_read() -> None:
    for path in FOLDER.glob("*.yaml"):
        assert {"model", "data", "trainer"} <= read_recipe(path).keys()
