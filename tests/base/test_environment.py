"""Numbers in the environment."""

import pytest

from ssmpretrain.base.environment import environment_number
from ssmpretrain.cli import main


def test_a_number_is_read_and_an_unset_variable_has_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert environment_number("WORLD_SIZE", 1) == 8
    monkeypatch.setenv("WORLD_SIZE", "")
    assert environment_number("WORLD_SIZE", 1) == 1
    monkeypatch.delenv("WORLD_SIZE")
    assert environment_number("WORLD_SIZE", 1) == 1


def test_another_text_is_named_and_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "first")
    assert main(["plan", "--epoch", "1"]) == 2
    assert "LOCAL_RANK is a whole number that a launcher sets; got 'first'. Unset it" in capsys.readouterr().err
