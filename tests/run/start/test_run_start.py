"""RunStart decides the start of a run in plain code. No test here builds a trainer."""

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ssmpretrain.base.run_folder import RunFolder
from ssmpretrain.base.whole_files import sha256_of
from ssmpretrain.encoders.weights import on_disk
from ssmpretrain.run.options.run_options import RunOptions
from ssmpretrain.run.start.run_request import RunRequest
from ssmpretrain.run.start.run_start import RunStart
from ssmpretrain.training.checkpoints import folder as checkpoint_folder
from ssmpretrain.training.checkpoints.files import write_checkpoint
from ssmpretrain.training.checkpoints.folder import Inspected
from ssmpretrain.training.optim.global_batch import GlobalBatch

SETTINGS = {"model": {"class_path": "a.MAE", "init_args": {"mask_ratio": 0.75}}}
REQUEST = RunRequest("MAE", "test_vim", max_epochs=3, batch=GlobalBatch(4, 1, 1, 1), data="Shards")


def content(step: int, **more: Any) -> dict[str, Any]:
    """A checkpoint of two steps an epoch."""
    counts = dict.fromkeys(("ready", "completed", "started", "processed"), step // 2)
    progress = {"total": counts, "current": counts}
    return {
        "state_dict": {"weight": torch.ones(1)}, "hyper_parameters": {}, "objective": "MAE", "callbacks": {},
        "encoder": {"name": "test_vim", "args": {}}, "global_step": step, "epoch": step // 2,
        "loops": {"fit_loop": {"epoch_progress": progress, "epoch_loop.batch_progress": progress}},
        "optimizer_states": [{"state": {0: {"step": step}}, "param_groups": [{}]}],
        "lr_schedulers": [{"last_epoch": step}], "pytorch-lightning_version": "2.6.0",
        "global_batch": {"per_device": 4, "devices": 1, "nodes": 1, "accumulation": 1}, **more,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run that was stopped after step 4, with its checkpoints of steps 2 and 4."""
    folder = RunFolder(tmp_path / "run")
    for step in (2, 4):
        write_checkpoint(content(step), folder.checkpoints / f"step-{step:09d}.ckpt")
    folder.last_checkpoint.symlink_to("step-000000004.ckpt")
    folder.config.write_text(yaml.safe_dump(SETTINGS))
    return folder


@pytest.fixture
def fit(folder: RunFolder) -> RunOptions:
    return RunOptions("fit", folder, settings=yaml.safe_dump(SETTINGS))


def told(start: RunStart) -> str:
    return "\n".join(text for _, text in start.notes)


def test_a_run_continues_from_its_newest_checkpoint(fit: RunOptions) -> None:
    start = RunStart.decide(fit, REQUEST)
    assert (start.step, start.complete, start.found.in_folder) == (4, False, True)
    assert start.ckpt_path == fit.folder.checkpoints / "step-000000004.ckpt"
    assert start.notes == ((logging.INFO, f"continuing {fit.folder.path} at step 4, epoch 2, sample 16"),)


def test_a_damaged_newest_is_named_and_the_one_before_used(fit: RunOptions) -> None:
    newest = fit.folder.checkpoints / "step-000000004.ckpt"
    newest.write_bytes(newest.read_bytes()[:-1])
    start = RunStart.decide(fit, REQUEST)
    assert start.step == 2 and [one.path for one in start.found.damaged] == [newest]
    assert start.notes[0][0] == logging.WARNING and f"{newest} cannot be used: short" in told(start)
    assert told(start).endswith(f", from {start.ckpt_path}")


@pytest.mark.parametrize(
    ("limits", "complete", "limit"),
    [({"max_epochs": 2}, True, "max_epochs"), ({"max_steps": 4, "max_epochs": None}, True, "max_steps"),
     ({"max_steps": 5, "max_epochs": -1}, False, ""), ({"max_epochs": None}, False, "")],
)  # fmt: skip
def test_a_run_is_complete_at_its_limits(fit: RunOptions, limits: dict[str, Any], complete: bool, limit: str) -> None:
    start = RunStart.decide(fit, replace(REQUEST, **limits))
    assert start.complete == complete
    assert (f"is complete: 2 epochs, step 4. Set a higher trainer.{limit} with" in told(start)) == complete


def test_a_run_that_was_stopped_early_is_complete_unless_changes_are_allowed(fit: RunOptions) -> None:
    write_checkpoint(content(4, stopped_early=True), fit.folder.checkpoints / "step-000000004.ckpt")
    start = RunStart.decide(fit, REQUEST)
    assert start.complete and "was stopped early, as its recipe asks for, at step 4 in epoch 2" in told(start)
    assert not RunStart.decide(replace(fit, allow_changes=True), REQUEST).complete


def test_changes_are_refused_or_told(fit: RunOptions) -> None:
    settings = yaml.safe_dump({"model": {"class_path": "a.MAE", "init_args": {"mask_ratio": 0.6}}})
    changed, other = replace(fit, settings=settings), replace(REQUEST, batch=GlobalBatch(4, 2, 1, 1))
    with pytest.raises(ValueError, match=r"model\.init_args\.mask_ratio: 0\.75 -> 0\.6") as error:
        RunStart.decide(changed, other)
    batch = "global batch: 4 = 4 per device x 1 device x 1 node x 1 accumulated, now 8 = "
    assert batch in str(error.value) and "--allow_changes" in str(error.value)
    start = RunStart.decide(replace(changed, allow_changes=True), other)
    assert start.notes[0][0] == logging.WARNING and batch in start.notes[0][1] and start.step == 4
    assert start.changes[0] == "model.init_args.mask_ratio: 0.75 -> 0.6" and start.changes[1].startswith(batch)


def test_a_callback_that_only_observed_may_be_left_out(fit: RunOptions) -> None:
    stored = {**SETTINGS, "trainer": {"callbacks": [{"class_path": "mine.Looks"}]}}
    fit.folder.config.write_text(yaml.safe_dump(stored))
    fit = replace(fit, settings=yaml.safe_dump({**SETTINGS, "trainer": {}}))
    with pytest.raises(ValueError, match=r"trainer\.callbacks\.Looks: \{\} -> \(not there\)"):
        RunStart.decide(fit, REQUEST)
    write_checkpoint(content(6, observers=["mine.Looks"]), fit.folder.checkpoints / "step-000000006.ckpt")
    assert RunStart.decide(fit, REQUEST).changes == ()


def test_an_option_of_a_later_version_has_its_default(fit: RunOptions) -> None:
    later = {**SETTINGS, "trainer": {"new": 1}}
    other = replace(REQUEST, with_defaults=lambda stored: {**stored, "trainer": {"new": 1}})
    assert RunStart.decide(replace(fit, settings=yaml.safe_dump(later)), other).step == 4
    with pytest.raises(ValueError, match="trainer"):
        RunStart.decide(replace(fit, settings=yaml.safe_dump(later)), REQUEST)


def test_without_a_checkpoint_a_run_begins_anew(fit: RunOptions) -> None:
    assert RunStart.decide(replace(fit, fresh=True), REQUEST) == RunStart()
    shutil.rmtree(fit.folder.checkpoints)
    start = RunStart.decide(fit, REQUEST)
    assert (start.step, start.ckpt_path, start.found.run_without) == (0, None, True)
    assert "the run there has no checkpoint; it starts anew" in told(start)
    fit.folder.config.unlink()
    assert RunStart.decide(fit, REQUEST) == RunStart()
    with pytest.raises(ValueError, match="no such checkpoint"):
        RunStart.decide(replace(fit, ckpt_path="last"), REQUEST)


@pytest.mark.parametrize(
    ("other", "message"),
    [(replace(REQUEST, objective="CLIP"), "is of objective MAE, the recipe asks for CLIP"),
     (replace(REQUEST, encoder="vim"), "is of encoder 'test_vim', the recipe asks for 'vim'"),
     (replace(REQUEST, num_classes=3), "is of None classes, the recipe asks for 3")],
)  # fmt: skip
def test_a_checkpoint_of_another_model_is_refused(fit: RunOptions, other: RunRequest, message: str) -> None:
    for options in (fit, replace(fit, command="validate")):
        with pytest.raises(ValueError, match=message):
            RunStart.decide(options, other)


def test_an_average_needs_the_callback_that_keeps_it(fit: RunOptions) -> None:
    averaged = content(4, current_model_state={"weight": torch.ones(1)})
    write_checkpoint(averaged, fit.folder.checkpoints / "step-000000004.ckpt")
    with pytest.raises(ValueError, match=r"Add ssmpretrain\.callbacks\.EMA"):
        RunStart.decide(fit, REQUEST)
    assert RunStart.decide(fit, replace(REQUEST, keeps_average=True)).step == 4
    validated = RunStart.decide(replace(fit, command="validate"), REQUEST)
    assert "without the EMA callback val/* are of that" in told(validated)


def test_validation_says_which_weights_are_evaluated(fit: RunOptions) -> None:
    options = replace(fit, command="validate")
    start = RunStart.decide(options, replace(REQUEST, reported="val/NAME_ema"))
    assert told(start) == f"validating the weights of {start.ckpt_path}, step 4, epoch 2\nreported: val/NAME_ema"
    untrained = RunStart.decide(replace(options, fresh=True), replace(REQUEST, begins_with="a.ckpt"))
    assert untrained.ckpt_path is None and "of a.ckpt, else untrained" in told(untrained)


def test_each_checkpoint_is_inspected_once(fit: RunOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    inspected: list[str] = []
    inspect: Callable[[Path], Inspected] = checkpoint_folder.inspect
    monkeypatch.setattr(checkpoint_folder, "inspect", lambda path: inspected.append(path.name) or inspect(path))
    RunStart.decide(fit, REQUEST)
    assert inspected == ["step-000000004.ckpt"]


def test_the_checksum_of_a_checkpoint_is_computed_once(fit: RunOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = (fit.folder.checkpoints / "step-000000004.ckpt").stat().st_ino
    hashed: list[int] = []

    def noted(descriptor: int) -> str:
        hashed.append(os.fstat(descriptor).st_ino)
        return sha256_of(descriptor)

    monkeypatch.setattr(on_disk, "sha256_of", noted)
    assert RunStart.decide(fit, REQUEST).step == 4
    assert hashed == [newest]
    # A file that the command names is not inspected before it is read.
    named = replace(fit, ckpt_path=str(fit.folder.checkpoints / "step-000000004.ckpt"))
    assert RunStart.decide(named, REQUEST).step == 4
    assert hashed == [newest] * 2
