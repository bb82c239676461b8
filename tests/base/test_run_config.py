"""Configuration of a run: any content of config.yaml is read or refused with a clear error."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ssmpretrain.base.run_config import read_config

_BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
)


def write(text: str | bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.mark.parametrize(
    "make, what",
    [
        (lambda path: None, "is missing"),
        (Path.mkdir, "cannot be read"),
        (os.mkfifo, "cannot be read"),
        (lambda path: path.symlink_to("/dev/zero"), "cannot be read"),
        (write(b"\xff\xfe\x00model"), "got text in UTF-16"),
        (write("data: [1,"), "not valid YAML"),
        (write("[" * 5000), "not valid YAML"),
        (write("a: !!python/object/apply:os.system [true]"), "not valid YAML"),
        (write(""), "got nothing"),
        (write("- a"), "got a list"),
        (write("7"), "got a single value"),
        (write("data: text"), "data has options; got a text"),
        (write("trainer: [1]"), "trainer has options; got a list"),
        (write("data: {init_args: {}}"), "data has a class_path; got nothing"),
        (write("data: {class_path: a.B, init_args: [1]}"), "data has init_args by name; got a list"),
        (write("trainer: {callbacks: [text]}"), "a callback has a class_path; got a text"),
        (write("trainer: {callbacks: 3}"), "callbacks are a list; got a number"),
        (write(_BOMB), "with its aliases written out, a value has at most"),
    ],
)
def test_other_kinds_are_named(tmp_path: Path, make: Callable[[Path], object], what: str) -> None:
    path = tmp_path / "config.yaml"
    make(path)
    with pytest.raises(ValueError) as caught:
        read_config(path)
    assert str(caught.value).startswith(f"{path}:") and what in str(caught.value)


def test_a_configuration_is_plain_data_and_may_be_a_link(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.symlink_to("elsewhere.yaml")
    path.write_text("model: null\ndata: {class_path: evil.Data}\ntrainer: {callbacks: {class_path: a.B}}\n")
    config = read_config(path)
    assert config["data"] == {"class_path": "evil.Data"}
    assert config["trainer"]["callbacks"] == [{"class_path": "a.B"}]
