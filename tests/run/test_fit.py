"""`fit` from its command line: the same command continues a stopped run, and names unusable files."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import ssmpretrain
from ssmpretrain.cli import main
from ssmpretrain.run.start.lock import RunLock

_RECIPE = """
model:
  class_path: ssmpretrain.objectives.Finetune
  init_args: {encoder: test_vim, num_classes: 2, mixup: 0.8, cutmix: 1.0, schedule: {warmup_epochs: 0}}
data:
  class_path: ssmpretrain.datamodules.ImageShards
  init_args: {train: train.tar, val: train.tar, image_size: 32, batch_size: 4, num_workers: 0}
trainer: {accelerator: cpu, devices: 1, max_epochs: 2, num_sanity_val_steps: 0, log_every_n_steps: 1,
  enable_progress_bar: false}
checkpoints: {every_n_steps: 3}
"""
Fit = Callable[..., tuple[int, str]]
FIT = ("fit", "--config", "recipe.yaml")
_KILLED_AFTER_STEP_6 = """
    import os, signal, sys
    from ssmpretrain.training.checkpoints import saving as checkpoints
    make_newest = checkpoints._make_newest
    def and_die(path, keep):
        make_newest(path, keep)
        if path.name == "step-000000006.ckpt":
            os.kill(os.getpid(), signal.SIGKILL)
    checkpoints._make_newest = and_die
    from ssmpretrain.cli import main
    main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, write_shard: Callable[..., Path]) -> Path:
    """A working folder with a recipe and a run of it, of two epochs of four steps."""
    folder = tmp_path_factory.mktemp("finished")
    write_shard(folder / "train.tar", count=16)
    (folder / "recipe.yaml").write_text(_RECIPE)
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(FIT) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder `finished`, to work in."""
    shutil.copytree(finished, tmp_path / "work", symlinks=True)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def fit(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Fit:
    """Run the recipe with further words; return the exit code and all output except the summary."""

    def run(*words: str) -> tuple[int, str]:
        capsys.readouterr()
        caplog.clear()
        code = main([*FIT, *words])
        return code, "\n".join([*caplog.messages, capsys.readouterr().err])

    return run


def rows(run: str) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics without the values that depend on the clock."""
    read = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    clock = ("time", "per_second", "wait", "memory")
    return [{name: value for name, value in row.items() if not any(word in name for word in clock)} for row in read]


def checkpoints(run: str = "runs/recipe") -> list[str]:
    return sorted(path.name for path in Path(run, "checkpoints").glob("step-*.ckpt*") if path.suffix != ".sha256")


def cut(name: str) -> None:
    path = Path("runs/recipe/checkpoints", name)
    path.write_bytes(path.read_bytes()[: random.Random(0).randrange(path.stat().st_size)])


def unfinished() -> None:
    """Take the last checkpoint of the run away, as if it had stopped after step 6."""
    for path in Path("runs/recipe/checkpoints").glob("step-000000008*"):
        path.unlink()
    Path("runs/recipe/checkpoints/last.ckpt").unlink()


def test_killed_after_a_save_the_same_command_leaves_the_rows_of_a_run_that_was_not(folder: Path, fit: Fit) -> None:
    whole = rows("runs/recipe")
    shutil.rmtree("runs")
    (folder / "killed.py").write_text(textwrap.dedent(_KILLED_AFTER_STEP_6))
    environment = {**os.environ, "PYTHONPATH": str(Path(ssmpretrain.__file__).parents[1])}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # sums depend on it
    command = [sys.executable, "killed.py", *FIT, "--data.num_workers", "1"]
    killed = subprocess.run(command, env=environment, capture_output=True, timeout=100)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with Path("runs/recipe/metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/loss": 0}\n{"step": 7, "trai')  # what the run had gone on to
    Path("runs/recipe/checkpoints/.step-000000009.ckpt.partial").write_text("half")

    code, err = fit()  # at once, while a worker of the killed run may be alive
    assert code == 0 and "continuing runs/recipe at step 6, epoch 1, sample 24\n" in err
    assert rows("runs/recipe") == whole
    assert checkpoints() == ["step-000000006.ckpt", "step-000000008.ckpt"]
    assert not list(Path("runs/recipe/checkpoints").glob(".*"))
    noted = Path("runs/recipe/environment.txt").read_text()
    assert noted.count("started ") == 2 and ", step 0, host" in noted and ", step 6, host" in noted


def test_of_a_complete_run_nothing_is_written(folder: Path, fit: Fit) -> None:
    def state() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in Path("runs").rglob("*") if p.is_file() and p.name != ".lock"}

    before = state()
    code, err = fit()
    assert code == 0 and "runs/recipe is complete: 2 epochs, step 8. Set a higher trainer.max_epochs" in err
    assert "--fresh" in err and state() == before
    code, err = fit("--trainer.fast_dev_run", "true")
    assert code == 0 and checkpoints() == ["step-000000006.ckpt", "step-000000008.ckpt"]


def test_a_damaged_newest_is_named_and_the_one_before_used(folder: Path, fit: Fit) -> None:
    cut("step-000000008.ckpt")
    code, err = fit()
    assert code == 0 and "step-000000008.ckpt cannot be used: short" in err
    assert "continuing runs/recipe at step 6, epoch 1, sample 24" in err
    assert checkpoints() == ["step-000000006.ckpt", "step-000000008.ckpt", "step-000000008.ckpt.aside"]
    assert ssmpretrain.load_encoder("runs/recipe") is not None

    for name in ("step-000000006.ckpt", "step-000000008.ckpt"):
        cut(name)
    before = rows("runs/recipe")
    code, err = fit()
    assert code == 2 and "step-000000008.ckpt (short" in err and "step-000000006.ckpt (short" in err
    assert "--fresh" in err and rows("runs/recipe") == before


def test_stopped_before_its_first_checkpoint_a_run_starts_anew_and_says_so(folder: Path, fit: Fit) -> None:
    whole = rows("runs/recipe")
    shutil.rmtree("runs/recipe/checkpoints")
    listed = Path("runs/recipe/bad_samples.jsonl")
    listed.write_text('{"split": "train", "epoch": 0, "cause": "empty files", "shard": "a.tar"}\n' * 5000)
    code, err = fit("--trainer.accumulate_grad_batches", "1")
    assert code == 0 and "the run there has no checkpoint; it starts anew" in err
    assert rows("runs/recipe") == whole and Path("runs/recipe/metrics.1.jsonl").exists()
    assert not listed.exists() and Path("runs/recipe/bad_samples.1.jsonl").exists()  # its samples may be repaired


def test_a_file_that_is_named_is_meant_exactly(folder: Path, fit: Fit) -> None:
    file = "runs/recipe/checkpoints/step-000000006.ckpt"
    code, err = fit("--ckpt_path", file, "--fresh")
    assert code == 2 and "Leave one of them out" in err
    code, err = fit("--ckpt_path", file)
    assert code == 0 and "at step 6" in err
    assert "step-000000008.ckpt.aside" in checkpoints()  # it was later than what the run went on from

    shutil.copytree("runs/recipe", "other", symlinks=True)
    code, err = fit("--ckpt_path", "other/checkpoints/step-000000006.ckpt")
    assert code == 2 and "a run of its own" in err
    code, err = fit("--ckpt_path", "other/checkpoints/step-000000006.ckpt", "--run_dir", "third")
    assert code == 0 and "from other/checkpoints/step-000000006.ckpt" in err and checkpoints("third")


def test_the_file_of_an_older_version_gets_a_name_and_is_kept(folder: Path, fit: Fit) -> None:
    old = Path("runs/recipe/checkpoints")
    content = torch.load(old / "step-000000006.ckpt", weights_only=True)
    content = {name: value for name, value in content.items() if name not in ("global_batch", "ImageShards")}
    content["callbacks"] = {"NonFiniteGuard": {"skipped": 0}}
    shutil.rmtree(old)
    old.mkdir()
    torch.save(content, old / "last.ckpt")
    code, err = fit()
    assert code == 0 and "continuing runs/recipe at step 6, epoch 1" in err
    assert checkpoints() == ["step-000000006.ckpt", "step-000000008.ckpt"]
    assert os.readlink(old / "last.ckpt") == "step-000000008.ckpt"


def test_a_changed_configuration_is_shown_and_refused_unless_allowed(folder: Path, fit: Fit) -> None:
    unfinished()
    ema = "--trainer.callbacks+=ssmpretrain.callbacks.EMA"
    code, err = fit("--model.optimizer.weight_decay", "0.5", "--model.label_smoothing", "0.2", ema)
    assert code == 2
    assert "  model.init_args.optimizer.weight_decay: 0.05 -> 0.5\n" in err
    assert "  model.init_args.label_smoothing: 0.0 -> 0.2\n" in err
    assert "  trainer.callbacks.EMA: (not there) -> {'decay': 0.9999, 'report': 'ema'}\n" in err
    assert "--allow_changes" in err and err.count(" -> ") == 3

    code, err = fit("--data.batch_size", "2")
    assert code == 2 and "set trainer.accumulate_grad_batches to 2" in err.lower()
    assert (
        "4 = 4 per device x 1 device x 1 node x 1 accumulated, now 2 = 2 per device x 1 device x 1 node x 1 accumulated"
        in err
    )
    before = Path("runs/recipe/config.yaml").read_text()
    look = "--trainer.callbacks+=lightning.pytorch.callbacks.LearningRateMonitor"
    same = ["--data.num_workers", "1", "--data.batch_size", "2", "--trainer.accumulate_grad_batches", "2", look]
    code, err = fit(*same, "--checkpoints.keep", "3", "--trainer.log_every_n_steps", "2")
    assert code == 0 and "configuration" not in err
    unfinished()
    code, err = fit("--model.optimizer.weight_decay", "0.5", "--allow_changes")
    assert code == 0 and "weight_decay: 0.05 -> 0.5" in err
    assert Path("runs/recipe/config.1.yaml").read_text() == before
    assert yaml.safe_load(Path("runs/recipe/config.yaml").read_text())["allow_changes"] is False


def test_an_option_that_an_older_version_did_not_have_is_no_change_but_one_that_is_gone(folder: Path, fit: Fit) -> None:
    config = yaml.safe_load(Path("runs/recipe/config.yaml").read_text())
    del config["model"]["init_args"]["label_smoothing"], config["checkpoints"], config["allow_changes"]
    Path("runs/recipe/config.yaml").write_text(yaml.safe_dump(config))
    assert fit()[0] == 0
    config["data"]["init_args"]["bygone"] = 3
    Path("runs/recipe/config.yaml").write_text(yaml.safe_dump(config))
    code, err = fit("--model.label_smoothing", "0.3")
    assert code == 2 and "data.init_args.bygone: 3 -> (not there)" in err
    assert "label_smoothing: 0.0 -> 0.3" in err and err.count(" -> ") == 2


def test_a_run_is_continued_by_its_own_config(folder: Path, fit: Fit) -> None:
    unfinished()
    code, err = fit("--config", "runs/recipe/config.yaml")
    assert code == 0 and "continuing runs/recipe at step 6" in err


def test_a_full_disk_at_the_end_of_a_run_is_exit_code_2_and_costs_nothing(folder: Path, fit: Fit) -> None:
    unfinished()
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    try:
        code, err = fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert code == 2 and "step-000000008.ckpt: not written: File too large" in err
    assert "bytes free. The newest that is there is step-000000006.ckpt" in err and "Traceback" not in err
    assert checkpoints() == ["step-000000006.ckpt"] and fit()[0] == 0


def test_a_file_under_a_new_name_is_gone_on_from_by_the_step_that_it_holds(folder: Path, fit: Fit) -> None:
    place = Path("runs/recipe/checkpoints")
    (place / "step-000000008.ckpt").rename(place / "step-000000099.ckpt")
    code, err = fit("--trainer.max_epochs", "3", "--allow_changes")
    assert code == 0 and "at step 8, epoch 2" in err and "now called step-000000008.ckpt" in err
    assert checkpoints() == ["step-000000009.ckpt", "step-000000012.ckpt"]

    shutil.copy(place / "step-000000009.ckpt", place / "step-000000100.ckpt")  # older than the newest
    code, err = fit("--trainer.max_epochs", "3")
    assert code == 0 and "is complete: 3 epochs, step 12" in err


def test_renamed_to_anything_a_lone_checkpoint_is_found(folder: Path, fit: Fit) -> None:
    unfinished()
    place = Path("runs/recipe/checkpoints")
    for old, new in ((".ckpt", "mine.ckpt"), (".ckpt.sha256", "mine.ckpt.sha256")):
        (place / f"step-000000006{old}").rename(place / new)
    code, err = fit()
    assert code == 0 and "continuing runs/recipe at step 6" in err
    assert checkpoints() == ["step-000000006.ckpt", "step-000000008.ckpt"]


def test_links_and_folders_in_the_place_of_checkpoints_stop_nothing(folder: Path, fit: Fit) -> None:
    unfinished()
    place = Path("runs/recipe/checkpoints")
    (place / "last.ckpt").mkdir()
    (place / "last.ckpt" / "notes").write_text("")
    (place / "step-000000009.ckpt").symlink_to("step-000000009.ckpt")
    (place / "step-000000010.ckpt").mkdir()
    (place / "step-000000007.ckpt").symlink_to("/dev/zero")
    (place / "step-000000006.ckpt.sha256").unlink()
    (place / "step-000000006.ckpt.sha256").mkdir()
    (place / "step-000000008.ckpt.sha256").mkdir()
    code, err = fit()
    assert code == 0 and "continuing runs/recipe at step 6" in err
    for name, what in (("10", "unfinished"), ("09", "cannot be read"), ("07", "no regular file")):
        assert f"step-0000000{name}.ckpt cannot be used: {what}" in err
    assert {"step-000000006.ckpt", "step-000000008.ckpt"} < set(checkpoints())
    assert os.readlink(place / "last.ckpt") == "step-000000008.ckpt" and (place / "last.ckpt.aside" / "notes").exists()


def test_damaged_lists_of_a_run_are_set_aside_and_it_goes_on(folder: Path, fit: Fit) -> None:
    unfinished()
    log = "--trainer.callbacks+=ssmpretrain.callbacks.SampleLog"
    damaged = b"\x00\xff\n[1]\n{"
    for name in ("metrics.jsonl", "bad_samples.jsonl", "samples-rank0.jsonl"):
        with Path("runs/recipe", name).open("ab") as file:
            file.write(damaged)
    code, err = fit(log)
    assert code == 0 and err.count("2 damaged lines set aside in ") == 3
    for name in ("metrics.jsonl", "samples-rank0.jsonl"):
        rows_after = [json.loads(line) for line in Path("runs/recipe", name).read_text().splitlines()]
        assert rows_after[-1]["step"] == 7
        assert Path("runs/recipe", f"{name}.damaged").read_bytes() == damaged[:-1]


def test_a_strangers_folder_imports_nothing_and_its_links_lead_nowhere(
    folder: Path, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished()
    run, victim = Path("runs/recipe"), Path("victim")
    victim.write_text("precious")
    (run / "evil.py").write_text("open('executed', 'w')")
    monkeypatch.syspath_prepend(str(folder))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"] = {"class_path": "runs.recipe.evil.Data", "init_args": {}}
    config["trainer"]["callbacks"] = [{"class_path": "runs.recipe.evil.Callback"}]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for name in ("environment.txt", "metrics.jsonl", ".lock", "parameter_groups.txt", ".config.yaml.partial",
                 "plots/loss.png", "bad_samples.jsonl"):  # fmt: skip
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(victim.absolute())
    code, err = fit()
    assert code == 2 and "data.class_path: runs.recipe.evil.Data -> ssmpretrain.datamodules.ImageShards" in err
    code, err = fit("--allow_changes")
    assert code == 0 and victim.read_text() == "precious" and not Path("executed").exists()
    assert (run / "metrics.jsonl").read_text().count("\n") >= 2

    for name in ("plots", "checkpoints"):
        (run / name).rename("moved")
        (run / name).symlink_to(Path("moved").absolute())
        code, err = fit("--allow_changes")
        assert code == 2 and f"{run / name}: a run writes and deletes files in its own folders alone" in err
        (run / name).unlink()
        Path("moved").rename(run / name)
    run.rename("elsewhere")
    run.symlink_to(Path("elsewhere").absolute())  # the whole folder may be a link
    assert fit()[0] == 0


def test_a_state_that_cannot_be_restored_is_one_sentence(folder: Path, fit: Fit) -> None:
    unfinished()
    place = Path("runs/recipe/checkpoints")
    (place / "step-000000006.ckpt.sha256").unlink()
    content = torch.load(place / "step-000000006.ckpt", weights_only=True)
    for name, state in (
        ("ImageShards", {"complete": False}), ("ImageShards", 3), ("callbacks", {"NonFiniteGuard": 3}),
    ):  # fmt: skip
        torch.save({**content, name: state}, place / "step-000000006.ckpt")
        code, err = fit()
        assert code == 2 and "step-000000006.ckpt: holds a training state that this run cannot be restored from" in err
    torch.save({**content, "optimizer_states": []}, place / "step-000000006.ckpt")
    assert "optimizer_states holds no state of an optimizer" in fit()[1]


def test_two_jobs_do_not_share_a_folder(folder: Path, fit: Fit) -> None:
    lock = RunLock(Path("runs/recipe"))
    for words in ((), ("--fresh",)):
        code, err = fit(*words)
        assert code == 2 and "another job is running in this folder (host " in err
        assert f"process {os.getpid()}, since " in err and "--run_dir" in err
    assert not Path("runs/recipe.1").exists()
    lock.release()
    assert fit()[0] == 0
    RunLock(Path("runs/recipe")).release()  # a run that ended has let go


def test_without_a_readable_configuration_nothing_says_whose_run_it_is(folder: Path, fit: Fit) -> None:
    config = Path("runs/recipe/config.yaml")
    for spoil, what in ((lambda: config.write_text("seed: [1,"), "not valid YAML"), (config.unlink, "is missing")):
        spoil()
        code, err = fit()
        assert code == 2 and f"{config}:" in err and what in err and "--allow_changes" in err
    assert fit("--allow_changes")[0] == 0
