"""Lightning's private parts do what this package expects of them; checked with Lightning 2.6.6."""

import ast
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.constants import default_pg_timeout
from torch.utils.data import DataLoader

import ssmpretrain
from ssmpretrain.base import lightning_private as private

CHECKED_WITH = "2.6"  # 2.6.6; look through every function of the module before raising it
PACKAGE = Path(ssmpretrain.__file__).parent


def test_lightning_is_the_version_that_its_private_parts_were_checked_with() -> None:
    assert version("lightning").startswith(f"{CHECKED_WITH}."), "read base/lightning_private.py against this version"


class Line(LightningModule):
    """Four batches of one number, two of them to an optimizer step; batch by batch it notes `seen`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seen: list[Any] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.seen.append((private.is_accumulating(self.trainer), private.epoch_has_no_batch_left(self.trainer)))
        loss = (self.weight * batch).sum()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.seen.append("validation")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.ones(4, 1))  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.ones(1, 1))  # type: ignore[arg-type]


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0}
    return Trainer(**{**quiet, "max_epochs": 1, "accumulate_grad_batches": 2, **options}, callbacks=list(callbacks))


def test_the_place_in_an_epoch_is_told() -> None:
    model = Line()
    trainer(limit_val_batches=0).fit(model)
    assert model.seen == [(True, False), (False, False), (True, False), (False, True)]


def test_a_run_that_a_callback_ends_stops_early_only_past_its_least_steps() -> None:
    told: list[bool] = []

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.should_stop = True
            told.append(private.stops_early(trainer))

    trainer(Stop(), min_steps=2, min_epochs=0, limit_val_batches=0).fit(Line())
    assert told == [False, False, False, True]


def test_a_validation_runs_whole_and_training_goes_on() -> None:
    class Validate(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            private.validate_now(trainer)
            assert trainer.training and not trainer.validating

    model = Line()
    trainer(Validate()).fit(model)
    assert model.seen[0] == "validation" and model.seen[-1] == "validation" and len(model.seen) == 6


def test_fetches_are_watched_and_lightnings_own_methods_called() -> None:
    calls: list[str] = []
    run = trainer(limit_val_batches=0)
    private.watch_fetching(run.fit_loop.epoch_loop, lambda: calls.append("before"), lambda: calls.append("after"))
    run.fit(Line())
    assert calls[:4] == ["before", "after"] * 2 and len(calls) >= 8


def test_counters_of_a_checkpoint_are_found_and_set() -> None:
    contents: list[dict[str, Any]] = []

    class Save(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            private.log_by_optimizer_step(trainer)
            contents.append(private.checkpoint_of(trainer))

    trainer(Save(), limit_val_batches=0, max_epochs=2).fit(Line())
    first, second = contents
    assert private.has_loop_counts(first) and [private.finished_epochs(one) for one in contents] == [1, 2]
    counts = private.loop_counts(second)
    assert counts.batches["current"]["processed"] == 4 and counts.batches["is_last_batch"] is True
    assert counts.epochs["current"]["ready"] == 2 and "is_last_batch" in counts.validation
    stepped = first["loops"]["fit_loop"]["epoch_loop.state_dict"]
    assert stepped == {"_batches_that_stepped": 2}
    private.set_logged_steps(first, 7)
    assert stepped == {"_batches_that_stepped": 7}
    for broken in ({}, {"loops": {}}, {"loops": {"fit_loop": {"epoch_progress": {"current": {}}}}}):
        assert not private.has_loop_counts(broken)


def test_a_restart_is_forgotten() -> None:
    run = trainer()
    run.fit_loop.restarting = True
    private.forget_restart(run)
    assert run.fit_loop.restarting is False


def test_a_training_step_is_logged_at_once() -> None:
    rows: list[int | None] = []

    class Rows(Logger):
        name, version = "rows", 0

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            rows.append(step)

        def log_hyperparams(self, *_: Any) -> None:
            pass

    class Log(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            before = len(rows)
            private.log_training_step(trainer)
            assert len(rows) == before + 1

    one_by_one = {"log_every_n_steps": 1, "accumulate_grad_batches": 1}
    trainer(Log(), logger=Rows(), limit_val_batches=0, **one_by_one).fit(Line())
    assert rows == [0, 0, 1, 1, 2, 2, 3, 3]  # Lightning's own row comes after ours


def test_signals_are_left_alone_and_a_run_stops_after_a_step() -> None:
    import signal

    before = signal.getsignal(signal.SIGTERM)

    class Stop(Callback):
        def setup(self, trainer: Trainer, *_: Any, **__: Any) -> None:
            private.leave_signals_alone(trainer)

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            assert signal.getsignal(signal.SIGTERM) is before
            if trainer.global_step == 1:
                private.stop_after_this_step(trainer)

    model = Line()
    with pytest.raises(SystemExit):
        trainer(Stop(), limit_val_batches=0).fit(model)
    assert len(model.seen) == 2


def test_errors_of_lightning_are_known_by_their_frames() -> None:
    with pytest.raises(Exception) as error:
        Trainer(accelerator="cpu", devices=1, min_steps=-7, max_steps="lots")  # type: ignore[arg-type]
    assert private.raised_by_lightning(error.value) or isinstance(error.value, TypeError)
    with pytest.raises(lightning.pytorch.utilities.exceptions.MisconfigurationException) as error:
        trainer(overfit_batches=-1)
    assert private.raised_by_lightning(error.value) and not private.was_restoring(error.value)
    assert not private.raised_by_lightning(ValueError("ours"))


def test_an_error_of_restoring_is_known(tmp_path: Path) -> None:
    class Guard(Callback):
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            raise KeyError("skipped")

        def state_dict(self) -> dict[str, Any]:
            return {"skipped": 1}

    run = trainer(Guard(), limit_val_batches=0)
    run.fit(Line())
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(KeyError) as error:
        trainer(Guard(), max_epochs=2).fit(Line(), ckpt_path=tmp_path / "a.ckpt")
    assert private.was_restoring(error.value) and not private.raised_by_lightning(error.value)


def test_launcher_and_timeout_of_a_strategy_are_replaced() -> None:
    from datetime import timedelta

    class Ours(private.ScriptLauncher):
        pass

    run = trainer(strategy="ddp", devices=2)
    assert isinstance(run.strategy, DDPStrategy) and run.strategy._timeout == default_pg_timeout
    private.use_launcher(run.strategy, Ours)
    assert type(run.strategy.launcher) is Ours and private.script_children(run) is run.strategy.launcher.procs
    assert hasattr(Ours, "_call_children_scripts")  # what `start_children` calls
    private.limit_waiting(run.strategy, timedelta(minutes=3))
    private.limit_waiting(run.strategy, timedelta(minutes=4))
    assert run.strategy._timeout == timedelta(minutes=3)  # no longer the default, so it stays
    assert private.script_children(trainer()) == []
    assert private.cluster_environment_of(run).world_size() >= 1


def test_threads_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(private, "_set_num_threads_if_needed", lambda num_processes: given.append(num_processes))
    run = trainer(strategy="ddp", devices=2)
    private.use_launcher(run.strategy, private.ScriptLauncher)
    assert isinstance(run.strategy.launcher, private.ScriptLauncher)
    run.strategy.launcher.limit_threads()
    assert given == [2]


def test_sharding_is_over_all_ranks() -> None:
    strategy = ModelParallelStrategy()
    strategy.parallel_devices, strategy.num_nodes = [torch.device("cpu")] * 3, 2
    private.shard_over_all_ranks(strategy)
    assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == (6, 1)
    assert {"_data_parallel_size", "_tensor_parallel_size"} <= vars(ModelParallelStrategy()).keys()


def test_hooks_that_the_command_line_overrides_are_there() -> None:
    base = lightning.pytorch.cli.LightningCLI
    assert callable(base._parse_ckpt_path) and callable(base._parser)
    assert private.CommandLine._parse_ckpt_path is not base._parse_ckpt_path


# Nobody else


def names_in(tree: ast.Module) -> set[str]:
    """Return the private names of other code that a module uses: attributes of all but self, and imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "private")):
                found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning"):
            found |= {name.name for name in node.names if name.name.startswith("_")}
    return found


def test_no_other_file_uses_a_private_part_of_lightning() -> None:
    theirs = names_in(ast.parse((PACKAGE / "base" / "lightning_private.py").read_text()))
    theirs |= {"_call_children_scripts", "_parse_ckpt_path", "_parser", "_data_fetcher", "_set_seed"}
    files = [
        *PACKAGE.rglob("*.py"),
        *(file for link in ("kernels", "datamodules") for file in (PACKAGE / link).rglob("*.py")),
    ]
    wrong = {}
    for file in files:
        if file.name == "lightning_private.py":
            continue
        text = file.read_text()
        imported = {name for name in names_in(ast.parse(text)) if name in theirs or name.endswith("_connector")}
        if imported or "checkpoint_connector" in text or "/lightning/" in text:
            wrong[str(file.relative_to(PACKAGE))] = sorted(imported) or "a file of Lightning's by its name"
    assert wrong == {}
