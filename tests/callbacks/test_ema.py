"""The average of the weights: its values, its use by other parts, and its restoration after a stop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

import ssmpretrain
from ssmpretrain.callbacks import EMA
from ssmpretrain.datamodules import ImageShards
from ssmpretrain.objectives import MAE, Finetune
from ssmpretrain.training.optim.adamw import AdamW
from ssmpretrain.training.optim.schedules import Cosine
from ssmpretrain.training.stopping.non_finite import NonFiniteGuard

HEAD = "encoder.head.weight"


class Watch(Callback):
    """Keep the head's weights after each step, and as validation sees them."""

    def __init__(self) -> None:
        self.trained: list[Tensor] = []
        self.validated: list[Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.trained.append(pl_module.state_dict()[HEAD].clone())

    def on_before_zero_grad(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == len(self.trained):
            self.trained.append(pl_module.state_dict()[HEAD].clone())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.trained.append(pl_module.state_dict()[HEAD].clone())

    def on_validation_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.validated.append(pl_module.state_dict()[HEAD].clone())

    on_validation_epoch_end = on_validation_batch_start


class Stop(Callback):
    """Fail in the middle of the second validation."""

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt


@pytest.fixture
def fit(tmp_path: Path, write_shard: Callable[..., Path]) -> Callable[..., Trainer]:
    """Train for epochs of 3 batches of 2 images, with mixing; returns the trainer."""
    shard = str(write_shard(tmp_path / "train.tar", count=6))

    def run(*callbacks: Callback, ckpt_path: Path | None = None, **settings: Any) -> Trainer:
        data = ImageShards(train=shard, val=shard, image_size=32, batch_size=2, num_workers=0)
        torch.manual_seed(0)
        model = Finetune(
            "test_vim", {"depth": 2}, num_classes=3, layer_decay=0.7, mixup=0.8, cutmix=1.0,
            optimizer=AdamW(lr_per_256=1.0), schedule=Cosine(warmup_epochs=0.5),
        )  # fmt: skip
        trainer = Trainer(
            accelerator="cpu", callbacks=list(callbacks), logger=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path, num_sanity_val_steps=1, limit_val_batches=1,
            **{"max_epochs": 2, "enable_checkpointing": False, **settings},
        )  # fmt: skip
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        return trainer

    return run


def saved(trainer: Trainer, path: Path) -> dict[str, Any]:
    trainer.save_checkpoint(path)
    return torch.load(path, weights_only=True)


def test_the_average_is_the_sum_of_its_definition(fit: Callable[..., Trainer], tmp_path: Path) -> None:
    watch = Watch()
    content = saved(fit(watch, EMA(0.75), max_epochs=1), tmp_path / "a.ckpt")
    average = watch.trained[0]
    assert len(watch.trained) == 4 and not torch.equal(watch.trained[0], watch.trained[3])
    for weights in watch.trained[1:]:
        average = 0.75 * average + 0.25 * weights
    torch.testing.assert_close(content["state_dict"][HEAD], average)
    assert torch.equal(content["current_model_state"][HEAD], watch.trained[3])


@pytest.mark.parametrize("report", ["ema", "raw"])
@pytest.mark.parametrize("order", [0, 1])
def test_validation_is_of_the_weights_in_training_and_the_finished_module_has_what_the_run_reports(
    order: int, report: Any, fit: Callable[..., Trainer], tmp_path: Path
) -> None:
    watch = Watch()
    trainer = fit(*[EMA(0.75, report), watch][:: 1 - 2 * order])
    content = saved(trainer, tmp_path / "a.ckpt")
    without = saved(fit(), tmp_path / "b.ckpt")["state_dict"][HEAD]
    trained, average = ("current_model_state", "state_dict") if report == "ema" else ("state_dict", "model_ema")
    assert torch.equal(content[trained][HEAD], without) and not torch.equal(content[average][HEAD], without)
    assert all(torch.equal(seen, without) for seen in watch.validated[-2:])
    assert torch.equal(trainer.lightning_module.state_dict()[HEAD], content["state_dict"][HEAD])


@pytest.mark.parametrize("report", ["ema", "raw"])
@pytest.mark.parametrize("masked", [False, True])
def test_metrics_are_of_the_weights_in_training_and_those_that_end_in_ema_of_the_average(
    masked: bool, report: Any, fit: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def validated(state: dict[str, Tensor]) -> dict[str, float]:
        """Validate with another trainer, which has no callback for the average."""
        model, plain = trainer.lightning_module, Trainer(accelerator="cpu", logger=False, limit_val_batches=1)
        model.load_state_dict(state)
        plain.validate(model, datamodule=data, verbose=False)
        return {name: float(value) for name, value in plain.callback_metrics.items() if name.startswith("val/")}

    if masked:
        monkeypatch.setitem(globals(), "Finetune", lambda name, args, **_: MAE(name, args, decoder_embed_dim=16))
    trainer = fit(EMA(0.75, report))
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    content, data = saved(trainer, tmp_path / "a.ckpt"), trainer.datamodule
    trainer.validate(
        trainer.lightning_module, datamodule=data, ckpt_path=tmp_path / "a.ckpt", verbose=False, weights_only=True
    )
    assert {name: float(trainer.callback_metrics[name]) for name in logged} == logged
    reported = trainer.lightning_module.state_dict()
    assert all(torch.equal(value, reported[name]) for name, value in content["state_dict"].items())
    raw = validated(content["current_model_state" if report == "ema" else "state_dict"])
    ema = validated(content["state_dict" if report == "ema" else "model_ema"])
    assert raw["val/loss"] != ema["val/loss"] and set(raw) == {"val/loss"} | (
        set() if masked else {"val/top1", "val/top5"}
    )
    assert logged == pytest.approx({**raw, **{f"{name}_ema": value for name, value in ema.items()}})


def test_a_run_goes_on_when_it_is_to_report_the_other_weights(fit: Callable[..., Trainer], tmp_path: Path) -> None:
    whole = saved(fit(EMA(0.75)), tmp_path / "whole.ckpt")
    fit(EMA(0.75), max_epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    rest = saved(fit(EMA(0.75, "raw"), ckpt_path=tmp_path / "half.ckpt"), tmp_path / "rest.ckpt")
    assert all(torch.equal(value, rest["model_ema"][name]) for name, value in whole["state_dict"].items())
    assert all(torch.equal(value, rest["state_dict"][name]) for name, value in whole["current_model_state"].items())


def test_a_monitor_of_the_weights_that_are_not_reported_is_named(caplog: pytest.LogCaptureFixture) -> None:
    def told(report: Any, monitor: str) -> str:
        caplog.clear()
        ema = EMA(0.75, report)
        trainer = Trainer(callbacks=[ema, EarlyStopping(monitor)], logger=False, enable_checkpointing=False)
        ema.setup(trainer, LightningModule(), "fit")
        return " ".join(message for message in caplog.messages if message.startswith("EMA: EarlyStopping"))

    assert told("ema", "val/loss").endswith(
        "monitors val/loss, and the run reports their average, whose metrics end in _ema"
    )
    assert told("raw", "val/loss_ema").endswith("the weights in training, whose metrics do not end in _ema")
    assert told("raw", "val/loss") == told("ema", "val/loss_ema") == told("ema", "train/loss") == ""


def test_accumulation_updates_it_once_a_step(fit: Callable[..., Trainer], tmp_path: Path) -> None:
    updates, lerp = [], torch._foreach_lerp_
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "_foreach_lerp_", lambda a, b, weight: updates.append(weight) or lerp(a, b, weight))
        trainer = fit(EMA(0.75), accumulate_grad_batches=2)
    assert trainer.global_step == len(updates) == 2  # an epoch of 3 batches is one step of 2


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 3}])
def test_six_steps_are_three_and_three_more_to_the_bit(
    settings: dict, fit: Callable[..., Trainer], tmp_path: Path
) -> None:
    keep = ModelCheckpoint(tmp_path / "kept", filename="{epoch}", save_top_k=-1)
    whole = saved(fit(EMA(0.75), keep, enable_checkpointing=True, **settings), tmp_path / "whole.ckpt")
    half = tmp_path / "kept" / "epoch=0.ckpt"
    resumed = saved(fit(EMA(0.75), ckpt_path=half, **settings), tmp_path / "resumed.ckpt")
    for part in ("state_dict", "current_model_state"):
        assert all(torch.equal(value, resumed[part][name]) for name, value in whole[part].items()), part
    assert not torch.equal(whole["state_dict"][HEAD], whole["current_model_state"][HEAD])
    assert not torch.equal(whole["state_dict"][HEAD], torch.load(half, weights_only=True)["state_dict"][HEAD])
    (ours,), (theirs,) = whole["optimizer_states"], resumed["optimizer_states"]
    assert ours["param_groups"] == theirs["param_groups"]
    assert all(torch.equal(ours["state"][i]["exp_avg"], theirs["state"][i]["exp_avg"]) for i in ours["state"])


def test_a_run_stopped_while_validating_saves_each_under_its_own_name(
    fit: Callable[..., Trainer], tmp_path: Path
) -> None:
    keep = ModelCheckpoint(tmp_path / "kept", filename="{epoch}", save_top_k=-1, save_on_exception=True)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(EMA(0.75), Stop(), keep, enable_checkpointing=True)
    stopped = torch.load(sorted((tmp_path / "kept").glob("*"))[-1], weights_only=True)
    whole = saved(fit(EMA(0.75)), tmp_path / "whole.ckpt")
    assert stopped["global_step"] == 6
    for part in ("state_dict", "current_model_state"):
        assert torch.equal(stopped[part][HEAD], whole[part][HEAD])


def test_a_skipped_step_leaves_it_finite(fit: Callable[..., Trainer], tmp_path: Path) -> None:
    class Poison(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            if trainer.global_step == 1:
                pl_module.encoder.head.weight.grad.fill_(float("nan"))

    guard = NonFiniteGuard()
    content = saved(fit(EMA(0.75), Poison(), guard), tmp_path / "a.ckpt")
    assert guard.skipped == 1
    assert all(
        value.isfinite().all() for part in ("state_dict", "current_model_state") for value in content[part].values()
    )


def test_it_starts_from_the_weights_of_a_checkpoint_without_one(fit: Callable[..., Trainer], tmp_path: Path) -> None:
    fit(max_epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    watch = Watch()
    content = saved(fit(EMA(1 - 1e-9), watch, ckpt_path=tmp_path / "half.ckpt"), tmp_path / "a.ckpt")
    torch.testing.assert_close(content["state_dict"][HEAD], watch.trained[0])
    assert not torch.equal(watch.trained[0], watch.trained[-1])


def test_validating_a_finished_run_changes_nothing(fit: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = fit(EMA(0.75))
    before = trainer.lightning_module.state_dict()[HEAD].clone()
    trainer.validate(trainer.lightning_module, datamodule=trainer.datamodule, verbose=False)
    assert torch.equal(trainer.lightning_module.state_dict()[HEAD], before)


@pytest.mark.parametrize("report", ["ema", "raw"])
def test_export_and_loading_tell_them_apart(report: Any, fit: Callable[..., Trainer], tmp_path: Path) -> None:
    content = saved(fit(EMA(0.75, report)), tmp_path / "a.ckpt")
    trained, average = ("current_model_state", "state_dict") if report == "ema" else ("state_dict", "model_ema")
    for ema, part in ((None, "state_dict"), (True, average), (False, trained)):
        encoder = ssmpretrain.load_encoder(tmp_path / "a.ckpt", ema=ema)
        assert torch.equal(encoder.state_dict()["head.weight"], content[part][HEAD])
        assert encoder.load_report.origin["weights"] == ("ema" if part == average else "raw")


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=r"EMA: decay is in \[0, 1\)"):
        EMA(decay)


def test_weights_that_are_neither_are_refused() -> None:
    with pytest.raises(ValueError, match="EMA: report is ema or raw; got 'both'"):
        EMA(report="both")  # type: ignore[arg-type]
