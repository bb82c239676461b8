"""Options on the command line: which may be given again, and what is said of a wrong one."""

import pytest

from ssmpretrain.cli import main
from ssmpretrain.option_messages import check_once

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
    "values": ["--train", "a", "a", "--val", "a"],
    "behind the options": ["--seed", "1", "--", "--seed", "1"],
}  # fmt: skip


@pytest.mark.parametrize("words", TWICE.values(), ids=TWICE)
def test_an_option_that_is_given_twice_is_refused(words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"given once; got '.+' and '.+'\. Leave"):
        check_once(words, ["--config"])


@pytest.mark.parametrize("words", AGAIN.values(), ids=AGAIN)
def test_what_may_be_given_again(words: list[str]) -> None:
    check_once(words, ["--config"])


@pytest.mark.parametrize("words", (["fit", "--data.x", "1", "--data.x", "2"], ["knn", "RUN", "--k", "1", "--k=2"]))
def test_every_command_refuses_it(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert "an option is given once; got '1' and '2'" in capsys.readouterr().err


@pytest.mark.parametrize("option", ("--seed", "--k", "--max-bank", "--batch-size"))
def test_a_number_that_no_machine_takes_is_refused_in_every_option(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (10**20, -(10**20)):
        assert main(["knn", "RUN", f"{option}={number}"]) == 2
        assert f"{option} is a number of at most 64 bits; got {number}" in capsys.readouterr().err
    assert main(["knn", "RUN", option, "9" * 5000]) == 2
    assert len(capsys.readouterr().err) < 500
