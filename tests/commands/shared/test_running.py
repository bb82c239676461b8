"""Commands of other installed packages: they are found, listed and run; wrong ones are refused."""

from collections.abc import Callable
from pathlib import Path

import installed
import pytest

from ssmpretrain.cli import main
from ssmpretrain.commands.shared.running import added_commands

COMMAND = '''"""Count the words that are given."""

def add_arguments(parser):
    parser.add_argument("words", nargs="+")
    parser.add_argument("--tag_of", action="append", default=[])

def run(args):
    print(f"{len(args.words)} words, tags {args.tag_of}")
    return 3
'''


Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Install a distribution with one module and entry points, in a folder of the import path."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(name: str, entry_points: str, module: str = COMMAND) -> None:
        package = name.replace("-", "_")
        (tmp_path / f"{package}.py").write_text(module)
        installed.install(tmp_path, name, "ssmpretrain.commands", entry_points)

    return install


def test_a_command_of_another_package_is_listed_and_run(install, capsys: pytest.CaptureFixture[str]) -> None:
    install("word-counter-one", "count = word_counter_one")
    assert main(["--help"]) == 0
    assert "count       from the package word-counter-one" in capsys.readouterr().out
    assert main(["count", "a", "b", "--tag_of", "x", "--tag_of=y"]) == 3
    out, err = capsys.readouterr()
    assert out == "2 words, tags ['x', 'y']\n" and "given twice" not in err
    with pytest.raises(SystemExit, match="0"):
        main(["count", "--help"])
    assert "Count the words that are given." in capsys.readouterr().out
    assert main(["count", "--nothing"]) == 2 and "See `ssmpretrain count --help`." in capsys.readouterr().err
    assert main(["coutn"]) == 2 and "Did you mean 'count'?" in capsys.readouterr().err


def test_a_command_that_does_not_fit_is_refused_with_the_name_of_its_package(
    install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("empty-command", "nothing = empty_command\nknn = empty_command", module="")
    assert main(["nothing"]) == 2
    assert "empty_command of the package empty-command has no add_arguments" in capsys.readouterr().err
    assert main(["knn"]) == 2 and "See `ssmpretrain knn --help`" in capsys.readouterr().err  # ours stays ours
    install("word-counter-two", "count = word_counter_two")
    install("word-counter-three", "count = word_counter_three")
    assert main(["count", "a"]) == 2
    assert "got word-counter-three and word-counter-two. Uninstall one of them." in capsys.readouterr().err


def test_the_commands_of_others_are_not_asked_for_where_the_name_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **group: pytest.fail("asked for"))
    assert main(["recipes"]) == 0
    with pytest.raises(pytest.fail.Exception):
        added_commands(())


def test_a_name_of_ours_stays_ours(install, capsys: pytest.CaptureFixture[str]) -> None:
    install("word-counter-knn", "knn = word_counter_knn")
    assert main(["--help"]) == 0
    assert "word-counter-knn" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "point", "module"),
    [
        ("no-module", "no_such_module", COMMAND),
        ("no-attribute", "no_attribute:nothing", COMMAND),
        ("no-python", "no_python", "def run(:\n"),
    ],
)
def test_a_command_that_cannot_be_imported_names_its_package(
    install, capsys: pytest.CaptureFixture[str], name: str, point: str, module: str
) -> None:
    install(name, f"broken = {point}", module)
    assert main(["broken"]) == 2
    err = capsys.readouterr().err
    assert f"broken: the command of the package {name} cannot be imported" in err and "Traceback" not in err


def test_a_command_that_returns_nothing_has_succeeded(install) -> None:
    install("word-counter-none", "count_none = word_counter_none", COMMAND.replace("return 3", "pass"))
    assert main(["count_none", "a"]) == 0
