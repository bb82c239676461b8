"""`ssmpretrain plan`: the samples that a run would read."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ssmpretrain.cli import main


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = main(["plan", *words])
    out, err = capsys.readouterr()
    return code, out + err


def test_thousands_of_ranks_are_planned_and_checked(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = plan(capsys, "--simulate", "100000", "20", "--ranks", "4096", "--batch-size", "32", "--check")
    assert code == 0
    assert "131,072 images = 32 x 4,096 ranks x 1 accumulated" in out
    assert "15 steps; each rank reads 480 samples in 15 batches" in out
    assert "33,920 samples left out" in out and "no sample twice, 33,920 not read; every rank 480 samples" in out
    milliseconds, megabytes = re.search(r"in ([\d,]+) ms with ([\d.]+) MB", out).groups()
    assert int(milliseconds.replace(",", "")) < 1000 and float(megabytes) < 100


def test_a_recipe_says_ranks_batch_and_shards_unless_the_command_does(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, write_shard: Callable[..., Path]
) -> None:
    shard = write_shard(tmp_path / "a.tar", count=8)
    (tmp_path / "r.yaml").write_text(
        f"data:\n  init_args: {{train: {shard}, batch_size: 2, remainder: repeat}}\n"
        "trainer: {devices: 2, num_nodes: 1, accumulate_grad_batches: 2}\n"
    )
    code, out = plan(capsys, "--config", str(tmp_path / "r.yaml"), "--check")
    assert code == 0 and "8 images = 2 x 2 ranks x 2 accumulated" in out and "0 samples left out" in out
    code, out = plan(capsys, "--config", str(tmp_path / "r.yaml"), "--ranks", "3", "--epoch-samples", "24", "--check")
    assert code == 0 and "an epoch is 3.00 passes over the data" in out and "each sample 3 to 3 times" in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--simulate", "3", "10", "--ranks", "4", "--batch-size", "10"],
            "got 30 samples in an epoch, for 4 ranks of 10",
        ),
        (["--simulate", "3", "10", "--ranks", "0"], "--ranks is at least 1; got 0"),
        (["--simulate", "0", "10"], "--simulate takes two numbers of at least 1; got 0 10"),
        ([], "no shards"),
        (["gone.tar"], "no file gone.tar"),
    ],
)
def test_what_cannot_be_planned_is_said(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = plan(capsys, *words)
    assert code == 2 and expected in out
