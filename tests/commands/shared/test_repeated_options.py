"""Options that a command line gives twice."""

import re

import pytest

from ssmpretrain.cli import main
from ssmpretrain.commands.shared.repeated_options import repeated_options

TWICE = {
    "two words": ["--data.batch_size", "4", "--data.batch_size", "8"],
    "with equals signs": ["--data.batch_size=4", "--x", "1", "--data.batch_size=8"],
    "in two spellings": ["--data.init_args.batch_size", "4", "--data.batch_size", "8"],
    "with dashes": ["--batch-size", "4", "--batch_size=8"],
    "a negative number": ["--seed", "-1", "--seed", "-2"],
    "of one element": ["--trainer.callbacks+=A", "--trainer.callbacks.n=1", "--trainer.callbacks.n=2"],
}
AGAIN = {
    "nothing": [],
    "recipes": ["--config", "a.yaml", "--config", "b.yaml", "--config=c.yaml"],
    "appended": ["--data.train+", "a", "--data.train+=b"],
    "of two elements": [
        "--trainer.callbacks+=A", "--trainer.callbacks.n=1", "--trainer.callbacks+=B", "--trainer.callbacks.n=2",
    ],
    "flags": ["--fresh", "--fresh"],
    "the same value": ["--trainer.devices", "8", "--trainer.devices=8"],
    "values": ["--train", "a", "a", "--val", "a"],
    "behind the options": ["--seed", "1", "--", "--seed", "1"],
}  # fmt: skip


@pytest.mark.parametrize("words", TWICE.values(), ids=TWICE)
def test_an_option_that_is_given_two_values_is_said_with_both(words: list[str]) -> None:
    (line,) = repeated_options(words, ["--config"])
    assert re.search(r"given twice, and the last counts: \S+, not \S+$", line)


@pytest.mark.parametrize("words", AGAIN.values(), ids=AGAIN)
def test_what_may_be_repeated_options(words: list[str]) -> None:
    assert repeated_options(words, ["--config"]) == []


def test_the_last_value_counts_and_a_line_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["knn", "RUN", "--k", "3", "--k=0"]) == 2
    said = capsys.readouterr().err
    assert "k: given twice, and the last counts: 0, not 3" in said and "got 0" in said
