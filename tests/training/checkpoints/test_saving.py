"""Times of saving, number of kept checkpoints, and failed saves."""

import errno
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import Tensor
from torch.utils.data import DataLoader

from ssmpretrain.training.checkpoints import files as checkpoint_files
from ssmpretrain.training.checkpoints import saving as checkpoints
from ssmpretrain.training.checkpoints.exact_resume import ExactResume
from ssmpretrain.training.checkpoints.files import CheckpointFiles
from ssmpretrain.training.checkpoints.folder import by_step, inspect, step_of
from ssmpretrain.training.checkpoints.saving import CheckpointNotSaved, Checkpoints
from ssmpretrain.training.stopping.non_finite import NonFiniteGuard, TrainingDiverged


class Toy(LightningModule):
    """Fits a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.weight * batch.mean()).square().sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", self.weight.sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


class Saves(Callback):
    """The steps at which a checkpoint was dumped, and the batches of the epoch trained then."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.seen.append((trainer.global_step, trainer.fit_loop.epoch_loop.batch_progress.current.ready))


def fit(folder: Path, *callbacks: Callback, ckpt_path: Path | None = None, **options: Any) -> Trainer:
    options = {"max_epochs": 2, **options}
    trainer = Trainer(
        accelerator="cpu", callbacks=list(callbacks), logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, num_sanity_val_steps=0, **options,
    )  # fmt: skip
    images = torch.ones(10)
    trainer.fit(Toy(), DataLoader(images, batch_size=1), DataLoader(images, batch_size=5), ckpt_path=ckpt_path)
    return trainer


def steps(folder: Path) -> list[int | None]:
    return [step_of(path) for path in by_step(folder / "checkpoints")]


def content(folder: Path, step: int) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(folder / "checkpoints" / f"step-{step:09d}.ckpt", weights_only=True)
    return loaded


def test_each_epoch_is_saved_and_the_newest_two_stay(tmp_path: Path) -> None:
    saves = Saves()
    fit(tmp_path, saves, Checkpoints(), max_epochs=3)
    assert [step for step, _ in saves.seen] == [10, 10, 20, 30] and steps(tmp_path) == [30, 20]
    assert (tmp_path / "checkpoints" / "last.ckpt").resolve().name == "step-000000030.ckpt"
    assert all(inspect(path).damage is None for path in by_step(tmp_path / "checkpoints"))


def test_a_save_waits_for_the_end_of_an_accumulated_step_and_of_an_epoch(tmp_path: Path) -> None:
    saves = Saves()
    fit(tmp_path, saves, Checkpoints(every_n_steps=1, every_n_epochs=None), accumulate_grad_batches=4)
    assert saves.seen == [(1, 4), (2, 8), (3, 10), (4, 4), (5, 8), (6, 10)]
    processed = content(tmp_path, 6)["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    assert processed == 2  # the epoch is over in it, its validation done


def test_the_end_of_a_run_is_saved_whenever_the_others_are(tmp_path: Path) -> None:
    fit(tmp_path / "a", Checkpoints(every_n_epochs=None))
    assert steps(tmp_path / "a") == [20, 10]  # before the first validation
    fit(tmp_path / "b", Checkpoints(every_n_epochs=5), max_epochs=-1, max_steps=13)
    assert steps(tmp_path / "b") == [13, 10]
    assert content(tmp_path / "b", 13)["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] == 1
    fit(tmp_path / "c", Checkpoints(every_n_minutes=1e-9, keep=3))
    assert steps(tmp_path / "c") == [20, 19, 18]


def test_a_run_goes_on_in_the_middle_of_an_epoch_and_ends_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", Checkpoints())
    fit(tmp_path / "parts", Checkpoints(), max_epochs=-1, max_steps=13)
    path = by_step(tmp_path / "parts" / "checkpoints")[0]
    parts = fit(tmp_path / "parts", Checkpoints(every_n_steps=1), ckpt_path=path)
    assert parts.global_step == whole.global_step == 20
    assert torch.equal(parts.lightning_module.weight, whole.lightning_module.weight)
    assert steps(tmp_path / "parts") == [20, 19]


class FailOnce(Callback):
    """Fail where the first validation ends, as a callback with loops of its own may."""

    failed = False

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.failed:
            self.failed = True
            raise ZeroDivisionError


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 5}])
def test_an_error_in_the_first_validation_costs_nothing(options: dict[str, Any], tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", Checkpoints(), **options)
    fail, validated = FailOnce(), int(options.get("val_check_interval", 10))
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "parts", fail, Checkpoints(), **options)
    assert steps(tmp_path / "parts") == [validated]
    last = tmp_path / "parts/checkpoints/last.ckpt"
    rest, saves = ExactResume(), Saves()
    parts = fit(tmp_path / "parts", rest, fail, saves, Checkpoints(), ckpt_path=last, **options)
    assert parts.global_step == whole.global_step == 20 and [step for step, _ in saves.seen] == [10, 20]
    assert torch.equal(parts.lightning_module.weight, whole.lightning_module.weight)


def test_the_place_of_the_newest_checkpoint_is_not_saved_again(tmp_path: Path) -> None:
    class Twice(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            callback.save(trainer)
            callback.save(trainer)

    saves, callback = Saves(), Checkpoints()
    fit(tmp_path, saves, callback, Twice(), max_epochs=1)
    assert saves.seen == [(10, 10)] * 2  # the first is of the same step, before its validation


def test_a_checkpoint_of_the_best_beside_it_works(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path / "checkpoints" / "best", monitor="val/loss", save_last=True)
    fit(tmp_path, best, Checkpoints())
    assert steps(tmp_path) == [20, 10] and (tmp_path / "checkpoints" / "best" / "last.ckpt").is_file()
    assert Path(best.best_model_path).with_name(Path(best.best_model_path).name + ".sha256").exists()


def test_a_plugin_of_the_user_is_left_to_do_the_writing(tmp_path: Path) -> None:
    trainer = fit(tmp_path, Checkpoints(), plugins=[AsyncCheckpointIO()])
    assert isinstance(trainer.strategy.checkpoint_io, AsyncCheckpointIO)
    assert steps(tmp_path) == [20, 10] and not list(tmp_path.glob("*/*.sha256"))


def test_a_weight_that_is_no_number_is_not_saved(tmp_path: Path) -> None:
    class Break(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 1:
                pl_module.weight.data.fill_(float("nan"))

    with pytest.raises(TrainingDiverged):
        fit(tmp_path, Break(), NonFiniteGuard(), Checkpoints())
    assert steps(tmp_path) == [10]


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Optimizer steps at which saving fails, as on a full disk; a test adds them."""
    full: set[int] = set()
    real = checkpoint_files.torch.save

    def save(state: Any, file: Any) -> None:
        if isinstance(state, dict) and state["global_step"] in full:
            file.write(b"a part")
            file.error = OSError(errno.ENOSPC, "No space left on device")
            raise RuntimeError("PytorchStreamWriter failed writing file")
        real(state, file)

    monkeypatch.setattr(checkpoint_files.torch, "save", save)
    return full


@pytest.mark.parametrize("async_save", [False, True])
def test_a_save_that_fails_midway_is_a_warning_and_the_next_is_tried(
    tmp_path: Path, full_disk: set[int], caplog: pytest.LogCaptureFixture, async_save: bool
) -> None:
    full_disk |= {8, 10}
    with caplog.at_level(logging.WARNING, checkpoints.__name__):
        trainer = fit(tmp_path, Checkpoints(every_n_steps=4, async_save=async_save))
    assert trainer.global_step == 20 and steps(tmp_path) == [20, 16]
    assert len(caplog.messages) == 2
    for part in ("No space left on device", "bytes free", "step-000000004.ckpt"):
        assert part in caplog.messages[0]
    assert not list((tmp_path / "checkpoints").glob(".*"))


@pytest.mark.parametrize("async_save", [False, True])
def test_a_last_save_that_fails_ends_the_run_and_the_earlier_one_stays(
    tmp_path: Path, full_disk: set[int], async_save: bool
) -> None:
    full_disk.add(20)
    with pytest.raises(CheckpointNotSaved, match=r"bytes free.*step-000000010"):
        fit(tmp_path, Checkpoints(async_save=async_save))
    assert steps(tmp_path) == [10]
    assert (tmp_path / "checkpoints" / "last.ckpt").resolve().name == "step-000000010.ckpt"


class Fails(Callback):
    """Raises while a checkpoint is put together, after the first."""

    def __init__(self, error: OSError) -> None:
        self.error, self.saves = error, 0

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.saves += 1
        if self.saves > 1:
            raise self.error


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file", "/x/list"), "/x/list: No such file. The newest"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/list"), "/x/list: Permission denied. The newest"),
        (OSError("in one's own words"), "in one's own words. The newest"),
    ],
)
def test_an_error_of_a_callback_is_not_a_full_disk(error: OSError, why: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotSaved) as caught:
        fit(tmp_path, Checkpoints(), Fails(error))
    message = str(caught.value)
    assert f"step-000000020.ckpt: not written: {why} that is there is step-000000010.ckpt. " in message
    assert "bytes free" not in message and "Free some space" not in message


def test_saved_in_a_thread_the_run_is_the_same(tmp_path: Path) -> None:
    one = fit(tmp_path / "a", Checkpoints(every_n_steps=3))
    other = fit(tmp_path / "b", Checkpoints(every_n_steps=3, async_save=True))
    assert isinstance(other.strategy.checkpoint_io, CheckpointFiles)
    assert steps(tmp_path / "a") == steps(tmp_path / "b") == [20, 18]
    for step in (18, 20):
        assert torch.equal(content(tmp_path / "a", step)["state_dict"]["weight"],
                           content(tmp_path / "b", step)["state_dict"]["weight"])  # fmt: skip
    assert torch.equal(one.lightning_module.weight, other.lightning_module.weight)


@pytest.mark.parametrize("wrong", [{"keep": 1}, {"every_n_steps": 0}, {"every_n_minutes": -1.0}])
def test_arguments_out_of_range_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"Checkpoints: {next(iter(wrong))}.*got"):
        Checkpoints(**wrong)
