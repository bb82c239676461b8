"""Progress lines: the share of time spent waiting for data, and the advice about it."""

import logging
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader

from ssmpretrain.callbacks import PlainProgress, Throughput, progress
from ssmpretrain.callbacks.progress import data_wait_hint, num_cores


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
        return self.weight * batch["image"].mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Images(LightningDataModule):
    """Four images a batch."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader([{"image": torch.zeros(3, 4, 4)}] * 40, batch_size=4)


class Clock:
    """A clock that only waiting for data and training move."""

    def __init__(self, wait: float, step: float) -> None:
        self.now, self.wait, self.step = 0.0, wait, step

    def perf_counter(self) -> float:
        return self.now

    def on_before(self, *args: Any) -> None:
        self.now += self.wait


class Timed(Throughput):
    """Throughput under a clock of our own."""

    def __init__(self, clock: Clock, **options: Any) -> None:
        self.clock = clock
        super().__init__(2, **options)

    def on_train_batch_start(self, *args: Any) -> None:
        self.clock.now += self.clock.wait
        super().on_train_batch_start(*args)

    def on_train_batch_end(self, *args: Any) -> None:
        self.clock.now += self.clock.step
        super().on_train_batch_end(*args)


def fit(throughput: Throughput, *others: Any, epochs: int = 1) -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_epochs=epochs, callbacks=[throughput, *others], **quiet)
    trainer.fit(Model(), Images())


@pytest.mark.parametrize(
    ("wait", "step", "epochs", "hints"),
    [(3, 7, 4, 1), (3, 7, 1, 1), (1, 9, 4, 0), (0.3, 0.7, 4, 0), (3, 7, 0, 0)],
)
def test_one_hint_where_training_keeps_waiting_for_data(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, wait: float, step: float, epochs: int, hints: int
) -> None:
    clock = Clock(wait, step)
    monkeypatch.setattr(progress.time, "perf_counter", clock.perf_counter)
    with caplog.at_level(logging.WARNING):
        fit(Timed(clock), epochs=epochs)
    said = [text for text in caplog.messages if "waits for images" in text]
    assert len(said) == hints
    assert all("waits for images 30% of the time with 0 workers; this process may use" in text for text in said)


def test_waiting_now_and_then_is_no_reason_for_a_hint(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock(0, 0)
    monkeypatch.setattr(progress.time, "perf_counter", clock.perf_counter)
    timed = Timed(clock)
    for waited in (30, 30, 5, 30, 30, 5):  # of windows of 100 seconds, in halves that are too short alone
        timed.patience = 250
        timed._waited = float(waited)
        timed._consider_hint(Trainer(accelerator="cpu", logger=False), 100.0)
    assert "waits for images" not in caplog.text


def test_plain_lines_show_the_share_of_time_that_training_waits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(0.12, 0.88)
    monkeypatch.setattr(progress.time, "perf_counter", clock.perf_counter)
    fit(Timed(clock), PlainProgress(0.0))
    assert "  data_wait 12 %" in capsys.readouterr().out


def test_the_bar_shows_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    clock = Clock(0.12, 0.88)
    monkeypatch.setattr(progress.time, "perf_counter", clock.perf_counter)
    bar = progress.progress_bar()
    fit(Timed(clock), bar)
    assert bar.get_metrics(bar.trainer, bar.trainer.lightning_module)["data_wait"] == "12 %"


@pytest.mark.parametrize(
    ("workers", "cores", "advice"),
    [(2, 16, "num_workers to 15"), (0, 2, "num_workers to 1"), (15, 16, "will not help"), (0, 1, "will not help")],
)
def test_the_hint_advises_workers_only_where_cores_are_free(workers: int, cores: int, advice: str) -> None:
    assert advice in data_wait_hint(0.34, workers, cores)


def test_ranks_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(16)), raising=False)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    assert (num_cores(1), num_cores(4), num_cores(32)) == (16, 4, 1)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "16")
    assert num_cores(4) == 16
