"""Options on the command line: which may be given again, and what is said of a wrong one."""

import re
from pathlib import Path

import pytest

from ssmpretrain.cli import main
from ssmpretrain.run.option_messages import given_again

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
    (line,) = given_again(words, ["--config"])
    assert re.search(r"given twice, and the last counts: \S+, not \S+$", line)


@pytest.mark.parametrize("words", AGAIN.values(), ids=AGAIN)
def test_what_may_be_given_again(words: list[str]) -> None:
    assert given_again(words, ["--config"]) == []


def test_the_last_value_counts_and_a_line_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["knn", "RUN", "--k", "3", "--k=0"]) == 2
    said = capsys.readouterr().err
    assert "k: given twice, and the last counts: 0, not 3" in said and "got 0" in said


@pytest.mark.parametrize("option", ("--seed", "--k", "--max-bank", "--batch-size"))
def test_a_number_that_no_machine_takes_is_refused_in_every_option(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (10**20, -(10**20)):
        assert main(["knn", "RUN", f"{option}={number}"]) == 2
        assert f"{option} is a number of at most 64 bits; got {number}" in capsys.readouterr().err
    assert main(["knn", "RUN", option, "9" * 5000]) == 2
    assert len(capsys.readouterr().err) < 500


RECIPE = """
model: {class_path: ssmpretrain.objectives.MAE, init_args: {encoder: test_vim, decoder_embed_dim: 32}}
data:
  class_path: ssmpretrain.datamodules.Shapes
  init_args: {train_images: 48, val_images: 48, image_size: 32, batch_size: 4, num_workers: 0}
trainer: {accelerator: cpu, devices: 1, max_epochs: 1}
"""


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    (
        ("model.optimizer.betas", "[.nan,0.9]", "model.optimizer.betas: is a finite number; got [nan, 0.9]."),
        ("model.optimizer.betas", "[0.9,-.inf]", "model.optimizer.betas: is a finite number; got [0.9, -inf]."),
        ("model.optimizer.betas", "[nano,0.9]", "model.optimizer.betas: takes a number; got \"['nano', 0.9]\"."),
        ("model", "[1, 2]", "model: takes a class by its full name, or class_path with init_args; got '[1, 2]'."),
        ("data.epoch_samples", "3", "got batch_size 4 and epoch_samples 3. Raise it"),
        (
            "trainer.devices",
            "abc",
            "devices is a whole number, a list of devices such as 0,1, or auto; got 'abc'",
        ),
        ("trainer.devices", "3.5", "trainer: devices is a whole number"),
        ("trainer.devices", "[0,x]", "trainer: devices is a whole number"),
        ("data.batch_size", "9" * 5000, "64 bits; got one of 5,000 characters"),
        ("model.encoder_args", "&a {x: *a}", "an alias stands for"),
        ("model.decoder_embed_dim", "100000000", "decoder_embed_dim is at most 16,384"),
        ("run_dir", "x" * 5000, "(5,0"),
        ("config", "trainer.yaml", "trainer: takes options by name, as `{max_epochs: 3}`; got 3."),
        ("config", "nul.yaml", "nul.yaml:1: no text or path holds a NUL character"),
    ),
)
def test_a_wrong_value_is_told_with_what_holds(
    option: str, value: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name, text in (("r", RECIPE), ("trainer", "trainer: 3\n"), ("nul", 'run_dir: "a\\0b"\n')):
        Path(f"{name}.yaml").write_text(text)
    assert main(["fit", "--config", "r.yaml", f"--{option}", value]) == 2
    message = "\n".join(line for line in capsys.readouterr().err.splitlines() if line.startswith("ssmpretrain: "))
    assert expected in message
    assert len(message) < 800 and "fault of ours" not in message


@pytest.mark.parametrize(
    "words",
    (
        ["knn", "RUN", "--repeats", "10_000_000"],
        ["erf", "RUN", "--num-images", "1_000_000_000"],
        ["plan", "--simulate", "4", "3_000_000_000_000_000_000"],
        ["plan", "--simulate", "4", "100", "--batch-size", "2", "--epoch-samples", "1_000_000_000_000_000_000"],
    ),
)
def test_a_number_that_would_take_all_memory_is_refused(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    message = capsys.readouterr().err
    assert re.search(r"(at most|from 1 to) [\d,]+; got [\d,]+", message), message
