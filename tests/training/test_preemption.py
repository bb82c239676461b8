"""Stopping by a signal: inside this process, at every place where a run can be."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader, Sampler

from ssmpretrain.callbacks.ema import EMA
from ssmpretrain.training.checkpoints import Checkpoints
from ssmpretrain.training.preemption import Preemption, watched
from ssmpretrain.training.run_folder import RunFolder

BATCHES, VALIDATION = 6, 3  # of an epoch


class Rest(Sampler[int]):
    """The batches of an epoch that are not trained yet."""

    def __init__(self) -> None:
        self.start = 0

    def __iter__(self) -> Iterator[int]:
        start, self.start = self.start, 0
        return iter(range(start, BATCHES))

    def __len__(self) -> int:
        return BATCHES


class Data(LightningDataModule):
    """Batches that depend on their number alone, and a position that counts trained ones."""

    def __init__(self) -> None:
        super().__init__()
        self.rest = Rest()
        self.items = torch.randn(BATCHES, 4, generator=torch.Generator().manual_seed(0))

    def train_dataloader(self) -> Any:
        return DataLoader(self.items, batch_size=None, sampler=self.rest)

    def val_dataloader(self) -> Any:
        return DataLoader(torch.ones(VALIDATION, 4), batch_size=None)

    def state_dict(self) -> dict[str, Any]:
        loop = self.trainer.fit_loop
        under_way = loop.epoch_progress.current.processed < loop.epoch_progress.current.started
        return {"trained": loop.epoch_loop.batch_progress.current.processed if under_way else 0}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rest.start = state["trained"]


class Model(LightningModule):
    """Four weights, and a diary of what it did."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4))
        self.losses: dict[int, float] = {}  # by batches before
        self.validated: dict[int, list[int]] = {}  # by steps before

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = (self.weight * batch).sum().square() - self.weight[0]
        self.losses[self.trainer.fit_loop.total_batch_idx] = loss.item()
        self.log("train/loss", loss)
        return loss

    def on_validation_epoch_start(self) -> None:
        self.validated[self.trainer.global_step] = []

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.validated[self.trainer.global_step].append(batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class At(Callback):
    """Send this process signals at one place."""

    def __init__(self, hook: str, count: int, *signals: signal.Signals) -> None:
        self.hook, self.count, self.signals = hook, count, signals

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        def fire(*given: Any, **named: Any) -> None:
            self.count -= 1
            if self.count == 0:
                for signum in self.signals or (signal.SIGTERM,):
                    os.kill(os.getpid(), signum)

        setattr(self, self.hook, fire)


class OwnLoop(Callback):
    """Goes through batches of its own in a validation, as OnlineEvaluation does."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for number in watched(trainer, range(4)):
            trainer.callback_metrics["own"] = torch.tensor(float(number))
            for callback in trainer.callbacks:
                if isinstance(callback, At) and callback.hook == "in_own_loop":
                    callback.in_own_loop()


def fit(folder: Path, *callbacks: Callback, max_time: Any = None, saves: int | None = None, **options: Any) -> Model:
    """Start or continue the run in `folder`, which saves every `saves` steps."""
    model = Model()
    trainer = Trainer(
        accelerator="cpu", default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_model_summary=False, **{"max_epochs": 3, "num_sanity_val_steps": 0, **options},
        callbacks=[*callbacks, EMA(0.5), OwnLoop(), Preemption(max_time), Checkpoints(saves, every_n_epochs=None)],
    )  # fmt: skip
    last = RunFolder(folder).last_checkpoint
    model.trainer_used = trainer
    try:
        trainer.fit(model, Data(), ckpt_path=last if last.exists() else None)
    except SystemExit as left:
        model.code = left.code
    else:
        model.code = 0
    return model


@pytest.fixture
def uninterrupted(tmp_path: Path) -> Callable[..., Model]:
    return lambda **options: fit(tmp_path / "uninterrupted", **options)


PLACES = {
    "in the middle of an epoch": ("on_train_batch_start", 3),
    "in the last batch of an epoch": ("on_train_batch_start", BATCHES),
    "after an epoch": ("on_train_epoch_end", 1),
    "at the beginning of a validation": ("on_validation_start", 1),
    "in a validation": ("on_validation_batch_end", 2),
    "in the last batch of a validation": ("on_validation_batch_start", VALIDATION),
    "in a loop of a callback": ("in_own_loop", 2),
}


@pytest.mark.parametrize("validation", [1.0, 0.5])
@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(
    place: str, validation: float, tmp_path: Path, uninterrupted: Callable[..., Model]
) -> None:
    options = {"val_check_interval": validation}
    whole = uninterrupted(**options)
    stopped = fit(tmp_path / "run", At(*PLACES[place]), **options)
    again = fit(tmp_path / "run", At(*PLACES[place]), **options)  # as long a part of what is left
    rest = fit(tmp_path / "run", **options)
    assert (stopped.code, again.code, rest.code) == (75, 75, 0)
    assert stopped.losses | again.losses | rest.losses == whole.losses
    assert len(stopped.losses) + len(again.losses) + len(rest.losses) == len(whole.losses)  # none a second time
    assert stopped.validated | again.validated | rest.validated == whole.validated
    assert torch.equal(rest.weight, whole.weight)
    assert rest.trainer_used.fit_loop.epoch_loop._batches_that_stepped == 3 * BATCHES


def test_a_run_killed_in_a_validation_in_the_middle_of_an_epoch_begins_with_that_validation(
    tmp_path: Path, uninterrupted: Callable[..., Model]
) -> None:
    class Lost(Callback):
        def on_validation_batch_end(self, trainer: Trainer, *given: Any, **named: Any) -> None:
            if trainer.global_step == 9:
                raise ConnectionError("the machine is gone")

    options = {"val_check_interval": 0.5, "saves": 3}
    whole = uninterrupted(**options)
    with pytest.raises(ConnectionError):
        fit(tmp_path / "run", Lost(), **options)
    rest = fit(tmp_path / "run", **options)
    assert sorted(rest.losses) == list(range(9, 18))
    assert rest.losses.items() <= whole.losses.items()
    assert sorted(rest.validated) == [9, 12, 15, 18]
    assert torch.equal(rest.weight, whole.weight)


def test_a_run_stops_after_an_optimizer_step_not_between_accumulated_batches(
    tmp_path: Path, uninterrupted: Callable[..., Model]
) -> None:
    options = {"accumulate_grad_batches": 3, "limit_val_batches": 0}
    whole = uninterrupted(**options)
    stopped = fit(tmp_path / "run", At("on_train_batch_start", 1), **options)
    assert sorted(stopped.losses) == [0, 1, 2]
    rest = fit(tmp_path / "run", **options)
    assert stopped.losses | rest.losses == whole.losses
    assert torch.equal(rest.weight, whole.weight)


@pytest.mark.parametrize("limit", [{"max_epochs": 1}, {"max_steps": 4}])
def test_a_signal_in_the_last_step_finds_the_run_complete(limit: dict[str, int], tmp_path: Path) -> None:
    steps = limit.get("max_steps", BATCHES)
    model = fit(tmp_path, At("on_train_batch_start", steps), limit_val_batches=0, **limit)
    assert (model.code, len(model.losses)) == (0, steps)


def test_an_epoch_of_one_batch_can_be_stopped(tmp_path: Path) -> None:
    model = fit(tmp_path, At("on_train_batch_start", 2), limit_train_batches=1, limit_val_batches=0, max_epochs=5)
    assert (model.code, len(model.losses)) == (75, 2)


def test_a_signal_in_the_sanity_check_ends_the_run_before_its_first_step(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = fit(tmp_path, At("on_validation_start", 1), num_sanity_val_steps=2)
    assert (model.code, model.losses) == (75, {})
    assert "stopped by SIGTERM before the first step" in capfd.readouterr().err
    assert not (tmp_path / "checkpoints").exists()


def test_one_line_says_what_stopped_where_it_stands_and_what_to_do(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, At("on_train_batch_start", BATCHES + 2, signal.SIGUSR1))
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("ssmpretrain: ")]
    assert lines == [
        "ssmpretrain: SIGUSR1: stopping after this step",
        f"ssmpretrain: stopped by SIGUSR1 at step 8 (epoch 1), saved {tmp_path}/checkpoints/step-000000008.ckpt; "
        "start the same command again to continue",
    ]


def test_a_run_stops_when_its_time_is_up_and_the_next_has_as_much(tmp_path: Path) -> None:
    codes = [fit(tmp_path, max_time={"microseconds": 1}, max_steps=3).code for _ in range(3)]
    assert codes == [75, 75, 0]  # a step each


def test_one_ctrl_c_stops_after_the_step_and_a_second_at_once(tmp_path: Path) -> None:
    assert fit(tmp_path / "one", At("on_train_batch_start", 2, signal.SIGINT)).code == 75
    two = fit(tmp_path / "two", At("on_train_batch_start", 2, signal.SIGINT, signal.SIGINT))
    assert (two.code, len(two.losses)) == (1, 1)  # Lightning's way; the command line makes 130 of it
    assert not (tmp_path / "two" / "checkpoints").exists()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_validate_just_ends(signum: signal.Signals, code: int, capfd: pytest.CaptureFixture[str]) -> None:
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    callbacks = [At("on_validation_batch_end", 1, signum), Preemption()]
    trainer, model = Trainer(callbacks=callbacks, **options), Model()
    with pytest.raises(SystemExit) as left:
        trainer.validate(model, Data())
    assert (left.value.code, model.validated) == (code, {0: [0]})
    assert f"ssmpretrain: stopped by {signum.name}\n" in capfd.readouterr().err


def test_a_checkpoint_that_cannot_be_written_is_an_error_and_not_a_stop(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(OSError):
        fit(tmp_path, At("on_train_batch_start", 2))


def test_handlers_are_those_of_before_when_the_run_is_over(tmp_path: Path) -> None:
    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(signum) for signum in signals]
    fit(tmp_path / "complete", max_epochs=1)
    fit(tmp_path / "stopped", At("on_train_batch_start", 2))
    assert [signal.getsignal(signum) for signum in signals] == before
