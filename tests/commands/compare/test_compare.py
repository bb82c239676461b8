"""`compare` from its command line: runs beside each other, on written folders and on a real run."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ssmpretrain.cli import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Write the folder of a run into an otherwise empty working folder."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, rows: list[dict[str, Any]], *, step: int | None = None, **options: Any) -> str:
        folder = tmp_path / name
        (folder / "checkpoints").mkdir(parents=True)
        config: dict[str, Any] = {
            "run_dir": name,
            "seed_everything": 0,
            "model": {"class_path": "ssmpretrain.objectives.Finetune", "init_args": {"encoder": "a", "mixup": 0.0}},
            "data": {"class_path": "ssmpretrain.datamodules.Digits", "init_args": {"num_workers": 1, "batch_size": 4}},
            "trainer": {"max_steps": 100, "max_epochs": None},
        }
        for option, value in options.items():
            section, _, key = option.partition("__")
            inner = config[section] if section == "trainer" else config[section]["init_args"]
            inner[key] = value
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        if step is not None:
            (folder / "checkpoints" / f"step-{step:09d}.ckpt").touch()
        return name

    return write


def accuracies(*values: float | None) -> list[dict[str, Any]]:
    """Rows with an accuracy after every tenth step, and one of the training loss after it."""
    return [
        {"step": 10 * number + 9, "val/top1": value, "val/loss": None if value is None else 1 - value}
        for number, value in enumerate(values)
    ]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_only_settings_that_differ_and_change_the_result_are_columns(write: Callable[..., str], call: Run) -> None:
    write("a", accuracies(0.5, 0.625, 0.25), step=100)
    write("b", accuracies(0.5), step=100, model__mixup=0.8, data__num_workers=2, trainer__log_every_n_steps=3)
    code, out, _ = call("compare", "a", "b", "--format", "markdown")
    head, _, first, second = (cells(line) for line in out.splitlines())
    assert code == 0
    assert head == ["run", "model.mixup", "steps", "parameters", "val/top1", "best val/top1", "val/loss",
                    "best val/loss"]  # fmt: skip
    # A row's step counts from 0; the last of 30 steps is step 29. The best loss is the smallest.
    assert first == ["a", "0", "100", "-", "0.25 @ 30", "0.625 @ 20", "0.75 @ 30", "0.375 @ 20"]
    assert second == ["b", "0.8", "100", "-", "0.5 @ 10", "0.5 @ 10", "0.5 @ 10", "0.5 @ 10"]


def test_arguments_of_another_class_are_no_columns_but_the_class_is(write: Callable[..., str], call: Run) -> None:
    write("a", accuracies(0.5), step=100, model__encoder_args=None)
    write("b", accuracies(0.5), step=100, model__encoder_args={"depth": 2})
    content = yaml.safe_load(Path("b/config.yaml").read_text())
    content["data"] = {"class_path": "mine.Images", "init_args": {"batch_size": 8, "mine": 1}}
    content["trainer"]["callbacks"] = [{"class_path": "ssmpretrain.callbacks.EMA", "init_args": {"decay": 0.5}}]
    Path("b/config.yaml").write_text(yaml.safe_dump(content))
    _, out, _ = call("compare", "a", "b", "--format", "json")
    settings = [run["settings"] for run in json.loads(out)["runs"]]
    assert settings == [
        {"data.class_path": "ssmpretrain.datamodules.Digits", "data.batch_size": 4},
        {"model.encoder_args.depth": 2, "data.class_path": "mine.Images", "data.batch_size": 8,
         "trainer.callbacks.EMA.decay": 0.5},
    ]  # fmt: skip


def test_a_setting_in_a_list_of_groups_is_named_by_its_place(write: Callable[..., str], call: Run) -> None:
    write("a", [], data__views=[{"count": 2, "size": None}, {"count": 8, "size": 96}])
    write("b", [], data__views=[{"count": 2, "size": None}, {"count": 6, "size": 96}])
    write("c", [], data__views=None, trainer__logger=[{"class_path": "a.Logger"}])  # output, left out
    _, out, _ = call("compare", "a", "b", "--format", "json")
    assert [run["settings"] for run in json.loads(out)["runs"]] == [
        {"data.views[1].count": 8},
        {"data.views[1].count": 6},
    ]
    _, out, _ = call("compare", "a", "c", "--format", "json")
    of_a, of_c = (run["settings"] for run in json.loads(out)["runs"])
    assert of_c == {} and set(of_a) == {f"data.views[{n}].{name}" for n in (0, 1) for name in ("count", "size")}


def test_runs_that_are_unfinished_empty_or_unreadable_are_named(write: Callable[..., str], call: Run) -> None:
    write("done", accuracies(0.5), step=100)
    write("lost", accuracies(0.5, None), step=20)
    write("empty", [])
    write("other", [{"step": 0, "train/loss": 1.0}], step=100)
    Path("broken").mkdir()
    Path("broken/config.yaml").write_text("model: 3")
    Path("many/one").mkdir(parents=True)
    Path("many/one/config.yaml").write_text("{}")
    code, out, _ = call("compare", "done", "lost", "empty", "other", "broken", "many", "done/", "--metric", "val/top1")
    table, _, notes = out.partition("\n\n")
    assert code == 0
    assert [line.split()[0] for line in table.splitlines()] == ["run", "done", "lost", "empty", "other"]
    assert notes.splitlines() == [
        "left out: broken/config.yaml: is no configuration of a run (model has options; got a number).",
        "left out: many/config.yaml: is missing. It holds 1 runs: name them, as many/*.",
        "lost: not finished: with a checkpoint that cannot be read (step-000000020.ckpt), step 20",
        "lost: the last val/top1 is not a finite number; shown is the one before",
        "empty: not finished: without a checkpoint, step 0",
        "empty: no metrics: its metrics.jsonl is missing or empty",
        "other: none of these metrics; it has train/loss",
    ]


def test_sorted_by_a_metric_the_best_come_first_and_runs_without_it_last(write: Callable[..., str], call: Run) -> None:
    for name, rows in {"a": accuracies(0.2), "b": [], "c": accuracies(0.7), "d": accuracies(0.5)}.items():
        write(name, rows, step=100, model__mixup=ord(name))

    def order(column: str) -> list[str]:
        out = call("compare", "a", "b", "c", "d", "--sort", column, "--format", "csv")[1]
        return [row["run"] for row in csv.DictReader(io.StringIO(out))]

    assert order("val/top1") == order("val/loss") == ["c", "d", "a", "b"]
    assert order("model.mixup") == ["a", "b", "c", "d"]


def test_csv_and_json_hold_whole_numbers_and_all_settings(write: Callable[..., str], call: Run) -> None:
    write("a", accuracies(1 / 3), step=100)
    write("b", accuracies(0.5), step=100, **{f"model__option_{number:02}": number for number in range(12)})
    _, out, _ = call("compare", "a", "b")
    assert "with --settings also: model.option_08, model.option_09, model.option_10, model.option_11" in out
    _, out, _ = call("compare", "a", "b", "--format", "csv")
    first, second = csv.DictReader(io.StringIO(out))
    assert (first["val/top1 last"], first["val/top1 last step"], first["state"]) == (str(1 / 3), "10", "finished")
    assert (first["model.option_11"], second["model.option_11"]) == ("", "11")
    _, out, _ = call("compare", "a", "b", "--format", "json", "--settings", "model.option_03")
    assert json.loads(out)["runs"][1]["settings"] == {"model.option_03": 3}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["b"], "compare: no such run: b. Beside it: a."),
        (["a", "--metric", "val/top2"], "got val/top2. Did you mean 'val/top1'?"),
        (["a", "--sort", "stepz"], "compare: --sort names a column; got stepz. Did you mean 'steps'?"),
        (["a", "--settings", "seed"], "got seed. No setting differs."),
        (["a/checkpoints"], "a/checkpoints/config.yaml: is missing."),
    ],
)
def test_a_wrong_word_is_refused_with_the_nearest(
    words: list[str], message: str, write: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    write("a", accuracies(0.5), step=100)
    assert main(["compare", *words]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_a_real_run_has_its_steps_parameters_and_end(run_folder_of_fit: Path, call: Run) -> None:
    _, out, _ = call("compare", run_folder_of_fit, "--format", "json")
    content = json.loads(out)
    (record,) = content["runs"]
    assert (record["state"], record["steps"], content["notes"]) == ("finished", 2, [])
    checkpoint = torch.load(run_folder_of_fit / "checkpoints" / "last.ckpt", weights_only=True)
    sizes = (value["exp_avg"].numel() for value in checkpoint["optimizer_states"][0]["state"].values())
    assert record["parameters"] == sum(sizes)
    assert record["metrics"].keys() >= {"val/loss"} and record["metrics"]["val/loss"]["last"]["step"] == 2
    config = run_folder_of_fit / "config.yaml"
    config.write_text(config.read_text().replace("max_epochs: 1", "max_epochs: 2"))
    assert "not finished: unfinished, step 2" in call("compare", run_folder_of_fit)[1]


@pytest.fixture
def run_folder_of_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_shard: Callable[..., Path]) -> Path:
    """What `fit` leaves of an epoch of two steps."""
    monkeypatch.chdir(tmp_path)
    shard = write_shard(tmp_path / "train.tar")
    data = f"{{train: {shard}, val: {shard}, image_size: 32, batch_size: 4, num_workers: 0}}"
    Path("mae.yaml").write_text(
        "model: {class_path: ssmpretrain.objectives.MAE, init_args: {encoder: test_vim, encoder_args: {patch_size: 8},"
        " decoder_embed_dim: 32, decoder_depth: 1}}\n"
        f"data: {{class_path: ssmpretrain.datamodules.ImageShards, init_args: {data}}}\n"
        "trainer: {accelerator: cpu, max_epochs: 1, num_sanity_val_steps: 0}\n"
    )
    assert main(["fit", "--config", "mae.yaml"]) == 0
    return tmp_path / "runs" / "mae"
