"""Checkpoints that a run can continue from, and those that are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ssmpretrain.run.start.checkpoint_checks import check_checkpoint
from ssmpretrain.run.start.run_request import RunRequest
from ssmpretrain.training.optim.global_batch import GlobalBatch

COUNTS = {"ready": 1, "completed": 1, "started": 1, "processed": 1}


REQUEST = RunRequest("MAE", "test_vim")


@pytest.fixture
def content() -> dict[str, Any]:
    progress = {"total": COUNTS, "current": COUNTS}
    return {
        "state_dict": {"weight": torch.ones(2)}, "hyper_parameters": {}, "objective": "MAE",
        "encoder": {"name": "test_vim", "args": {}}, "global_step": 1, "epoch": 0, "callbacks": {},
        "loops": {"fit_loop": {"epoch_progress": progress, "epoch_loop.batch_progress": progress}},
        "optimizer_states": [{"state": {}, "param_groups": [{}]}], "lr_schedulers": [{"last_epoch": 1}],
        "pytorch-lightning_version": "2.6.0",
    }  # fmt: skip


def check(content: Any, path: Path, to_train: bool = True) -> str:
    torch.save(content, path)
    try:
        check_checkpoint(str(path), REQUEST, to_train=to_train)
    except ValueError as error:
        return str(error)
    return ""


NEEDED = ["state_dict", "hyper_parameters", "loops", "global_step", "epoch", "optimizer_states", "lr_schedulers"]


def test_what_a_checkpoint_lacks_or_has_of_another_kind_is_named(content: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    assert check(content, path) == ""
    for name in NEEDED:
        without = {key: value for key, value in content.items() if key != name}
        assert f"{path}: holds no training state that can be continued: it lacks {name}." in check(without, path)
    for name in [*NEEDED, "encoder", "callbacks", "objective", "pytorch-lightning_version"]:
        assert f"{path}: {name} is of another kind" in check({**content, name: (1,)}, path)
    for loops in ({}, {"fit_loop": {}}, {"fit_loop": {"epoch_progress": {"current": COUNTS}}}):
        assert "loops does not say" in check({**content, "loops": loops}, path)
    for states in ([], [1], [{"state": {}}]):
        assert "optimizer_states holds no state" in check({**content, "optimizer_states": states}, path)
    assert "is no version" in check({**content, "pytorch-lightning_version": "new"}, path)
    assert "it lacks anything by name" in check([1], path)


@pytest.mark.parametrize("schedulers", [[], [{}], [7], [{"last_epoch": float("nan")}], [{"last_epoch": 1.0}],
    [{"last_epoch": True}], [{"last_epoch": -5}], [{"last_epoch": 3}], [{"last_epoch": 1}] * 2])  # fmt: skip
def test_a_schedule_is_where_the_optimizer_is(content: dict[str, Any], tmp_path: Path, schedulers: list[Any]) -> None:
    said = check({**content, "lr_schedulers": schedulers}, tmp_path / "x.ckpt")
    assert "lr_schedulers says for each of 1 optimizers that its last_epoch is 1, the step; got [" in said
    assert check({**content, "lr_schedulers": schedulers}, tmp_path / "x.ckpt", to_train=False) == ""


def test_an_optimizer_without_moments_after_its_first_step_is_refused(content: dict[str, Any], tmp_path: Path) -> None:
    adam = {"params": [0, 1], "betas": (0.9, 0.95)}

    def with_state(state: dict[int, Any], *, group: dict[str, Any] = adam, skipped: int = 0, step: int = 1) -> str:
        states = {"optimizer_states": [{"state": state, "param_groups": [group]}]}
        at = {"global_step": step, "lr_schedulers": [{"last_epoch": step}]}
        skips = {"callbacks": {"NonFiniteGuard": {"skipped": skipped}}}
        return check({**content, **states, **at, **skips}, tmp_path / "x.ckpt")

    assert "optimizer_states has no moments, at step 1; the optimizer would begin anew. Give" in with_state({})
    assert with_state({1: {"step": 1}}) == with_state({}, step=0) == with_state({}, skipped=1) == ""
    assert with_state({}, group={"params": [0], "momentum": 0}) == ""


def test_to_be_validated_a_checkpoint_needs_no_optimizer(content: dict[str, Any], tmp_path: Path) -> None:
    weights = {key: value for key, value in content.items() if key not in ("optimizer_states", "lr_schedulers")}
    assert check(weights, tmp_path / "x.ckpt", to_train=False) == ""


@pytest.mark.parametrize("data", [None, {}, {"class_path": "a.B", "init_args": None}])
def test_a_batch_that_nobody_says_is_none(data: Any) -> None:
    assert (
        GlobalBatch.stored({"global_batch": {"per_device": "x"}}, {}) is None
        and GlobalBatch.stored({}, {"data": data}) is None
    )
    said = {"per_device": 2, "devices": 1, "nodes": 1, "accumulation": 3, "more": 1}
    assert GlobalBatch.stored({"global_batch": said}, {}) == GlobalBatch(2, 1, 1, 3)
