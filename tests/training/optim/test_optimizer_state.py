"""A continued run uses the settings of its configuration and the moments of its checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from ssmpretrain.datamodules import ImageShards
from ssmpretrain.objectives import Finetune, LinearProbe
from ssmpretrain.training.optim.adamw import AdamW
from ssmpretrain.training.optim.lars import LARS
from ssmpretrain.training.optim.optimizer_state import keep_settings
from ssmpretrain.training.optim.schedules import Cosine
from ssmpretrain.training.ranks.fsdp import FSDP2

ENCODER: dict[str, Any] = {"encoder": "test_vim", "encoder_args": {"depth": 2}}
_OF_TORCH = ("params", "initial_lr", "lr")


class Look(Callback):
    """Record the settings and the moments of the optimizer at the start, and the learning rate of each step."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (optimizer,) = trainer.optimizers
        self.groups = [dict(group) for group in optimizer.param_groups]
        names = {parameter: name for name, parameter in pl_module.named_parameters()}
        self.state = {
            names[parameter]: {name: value.clone() for name, value in state.items()}
            for parameter, state in optimizer.state.items()
        }
        self.rates = [optimizer.param_groups[-1]["lr"]]

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[-1]["lr"])


@pytest.fixture
def fit(tmp_path: Path, write_shard: Callable[..., Path]) -> Callable[..., Look]:
    """Train epochs of 8 images, and return the record of the optimizer."""
    shard = str(write_shard(tmp_path / "train.tar"))

    def run(model: LightningModule, *callbacks: Callback, batch: int = 4, resume: bool = False, **limits: Any) -> Look:
        data, look = ImageShards(shard, image_size=32, batch_size=batch, num_workers=0), Look()
        trainer = Trainer(
            accelerator="cpu", callbacks=[look, *callbacks], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, **limits,
        )  # fmt: skip
        path = str(tmp_path / "last.ckpt")
        trainer.fit(model, data, ckpt_path=path if resume else None, weights_only=True)
        trainer.save_checkpoint(path)
        return look

    return run


def finetune(layer_decay: float = 1.0, warmup_epochs: float = 0, **optimizer: Any) -> Finetune:
    schedule = Cosine(warmup_epochs=warmup_epochs, final_fraction=0.5)
    return Finetune(**ENCODER, num_classes=2, layer_decay=layer_decay, optimizer=AdamW(**optimizer), schedule=schedule)


def test_every_changed_setting_is_the_optimizers_and_each_parameter_keeps_its_moments(
    fit: Callable[..., Look], tmp_path: Path
) -> None:
    fit(finetune(lr_per_256=0.1), max_epochs=1)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["optimizer_states"][0]
    changed = {"lr_per_256": 0.01, "weight_decay": 0.3, "betas": (0.5, 0.6), "eps": 1e-3, "decay": "all"}
    found = fit(finetune(layer_decay=0.5, warmup_epochs=3, **changed), max_epochs=4, resume=True)
    asked = fit(finetune(layer_decay=0.5, warmup_epochs=3, **changed), max_epochs=4)

    assert len(found.groups) == 3 != len(saved["param_groups"])  # by layer now, all decayed; before, by decay
    for ours, theirs in zip(found.groups, asked.groups, strict=True):
        assert {k: v for k, v in ours.items() if k not in _OF_TORCH} == {
            k: v for k, v in theirs.items() if k not in _OF_TORCH
        }
        assert ours["initial_lr"] == theirs["initial_lr"]
    assert found.rates == asked.rates[2:]
    numbers = {n: i for group in saved["param_groups"] for n, i in zip(group["param_names"], group["params"])}  # noqa: B905
    assert set(found.state) == set(numbers)
    assert all(torch.equal(one["exp_avg"], saved["state"][numbers[n]]["exp_avg"]) for n, one in found.state.items())


def test_another_batch_has_its_rate_and_the_run_still_ends_at_the_end_of_its_schedule(fit: Callable[..., Look]) -> None:
    first = fit(finetune(lr_per_256=0.1), batch=2, max_epochs=2)
    rest = fit(finetune(lr_per_256=0.1), batch=4, max_epochs=4, resume=True)
    whole = fit(finetune(lr_per_256=0.1), batch=4, max_epochs=4)
    assert first.groups[0]["initial_lr"] == 0.1 * 2 / 256 and rest.groups[0]["initial_lr"] == 0.1 * 4 / 256
    assert rest.rates == whole.rates[4:] and rest.rates[-1] == pytest.approx(0.5 * 0.1 * 4 / 256)


def test_where_steps_end_the_run_its_place_is_a_step(fit: Callable[..., Look]) -> None:
    fit(finetune(), batch=2, max_steps=4)
    rest = fit(finetune(), batch=4, max_steps=8, resume=True)
    assert rest.rates == fit(finetune(), batch=4, max_steps=8).rates[4:]


def test_a_probes_heads_go_on_with_the_momentum_and_the_batch_of_the_configuration(fit: Callable[..., Look]) -> None:
    def probe(momentum: float) -> LinearProbe:
        return LinearProbe(**ENCODER, num_classes=2, learning_rates=[0.1, 1.0], optimizer=LARS(momentum=momentum))

    fit(probe(0.9), batch=2, max_epochs=1)
    found = fit(probe(0.5), batch=4, max_epochs=2, resume=True)
    assert {group["momentum"] for group in found.groups} == {0.5}
    assert {group["initial_lr"] for group in found.groups} == {0.1 * 4 / 256, 4 / 256}
    assert all("momentum_buffer" in state for state in found.state.values())


def test_the_patience_is_that_of_the_configuration(fit: Callable[..., Look]) -> None:
    def stop(patience: int) -> EarlyStopping:
        return EarlyStopping("train/loss", patience=patience)

    fit(finetune(), stop(3), max_epochs=1)
    patient = stop(7)
    fit(finetune(), patient, max_epochs=2, resume=True)
    assert patient.patience == 7


def test_of_a_gradient_scaler_only_the_scale_is_taken(fit: Callable[..., Look]) -> None:
    def plugin(growth_interval: int, init_scale: float) -> MixedPrecision:
        return MixedPrecision(
            "16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale, growth_interval=growth_interval)
        )

    fit(finetune(), plugins=[plugin(100, 4.0)], max_epochs=1)
    later = plugin(7, 512.0)
    fit(finetune(), plugins=[later], max_epochs=2, resume=True)
    assert later.scaler is not None
    assert later.scaler.get_growth_interval() == 7 and later.scaler.get_scale() == 4.0


# One optimizer and one state


def made(module: nn.Module, cls: type[torch.optim.Optimizer] = torch.optim.AdamW, lr: float = 1.0) -> Any:
    """An optimizer with a group for each trained parameter, last one first."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = cls([{"params": [parameter]} for parameter in reversed(trained)], lr=lr)  # type: ignore[call-arg]
    keep_settings(optimizer, module)
    return optimizer


def stepped(module: nn.Module) -> dict[str, Any]:
    """The state of `made` after a step in which parameter number i had the gradient i."""
    optimizer = made(module)
    for number, parameter in enumerate(module.parameters()):
        parameter.grad = torch.full_like(parameter, number + 1.0) if parameter.requires_grad else None
    optimizer.step()
    state: dict[str, Any] = optimizer.state_dict()
    return state


def test_one_that_is_trained_no_more_and_one_that_is_new_are_named(caplog: pytest.LogCaptureFixture) -> None:
    before, now = nn.Linear(2, 3), nn.Linear(2, 3)
    before.bias.requires_grad_(False)
    now.weight.requires_grad_(False)
    state = stepped(before)
    with pytest.raises(ValueError, match=r"state of parameters such as weight, .* trains others, such as bias"):
        made(now).load_state_dict(state)
    now.weight.requires_grad_(True)
    optimizer = made(now, lr=0.5)
    optimizer.load_state_dict(state)
    assert "1 parameters were not trained before; they begin without moments: bias" in caplog.text
    assert optimizer.state[now.weight]["exp_avg"].unique().tolist() == pytest.approx([0.1])
    assert now.bias not in optimizer.state and {group["lr"] for group in optimizer.param_groups} == {0.5}
    before.bias.requires_grad_(True)
    now.bias.requires_grad_(False)
    made(now).load_state_dict(stepped(before))
    assert "1 parameters are trained no more; their moments are dropped: bias" in caplog.text


def test_the_state_of_another_class_is_refused() -> None:
    module = nn.Linear(2, 3)
    with pytest.raises(ValueError, match="is of AdamW; SGD, which the configuration asks for, cannot go on with it"):
        made(module, torch.optim.SGD).load_state_dict(stepped(module))


def test_a_state_without_names_is_taken_by_position_and_only_where_the_groups_are_the_same() -> None:
    module = nn.Linear(2, 3)
    state = stepped(module)
    for group in state["param_groups"]:
        del group["param_names"]
    del state["class"]
    optimizer = made(module)
    optimizer.load_state_dict(state)
    assert optimizer.state[module.bias]["exp_avg"].unique().tolist() == pytest.approx([0.2])
    state["param_groups"] = [{**state["param_groups"][0], "params": [0, 1]}]
    with pytest.raises(ValueError, match=r"groups are others now: \[2\] parameters in each, now \[1, 1\]"):
        made(module).load_state_dict(state)


def test_in_shards_too_moments_go_by_name() -> None:
    module = nn.Linear(2, 3)
    strategy = FSDP2()
    strategy.optimizers = [made(module, lr=0.5)]
    groups = [{"params": [0], "param_names": ["weight"]}, {"params": [1], "param_names": ["bias"]}]
    step = {"step": torch.tensor(1.0)}
    moments = {0: {**step, "exp_avg": torch.full((3, 2), 7.0)}, 1: {**step, "exp_avg": torch.full((3,), 8.0)}}
    strategy.load_optimizer_state_dict({"optimizer_states": [{"state": moments, "param_groups": groups}]})
    state = strategy.optimizers[0].state
    assert state[module.weight]["exp_avg"].unique() == 7 and state[module.bias]["exp_avg"].unique() == 8
    assert {group["lr"] for group in strategy.optimizers[0].param_groups} == {0.5}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("exp_avg", float("nan"), r"optimizer: moments are .* in the checkpoint 1 of 4 values of exp_avg of weight"),
        ("exp_avg_sq", float("inf"), "1 of 4 values of exp_avg_sq of weight are NaN or infinite"),
        ("step", -3.0, r"steps are counted from 0; the checkpoint has tensor\(-3.\) of weight. Give an earlier"),
        ("step", float("nan"), "values of step of weight are NaN"),
    ],
)
def test_moments_that_would_spoil_the_weights_are_refused(name: str, value: float, said: str) -> None:
    module = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    keep_settings(optimizer, module)
    module.weight.sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    assert len(saved["state"]) == 1  # the bias took no part
    optimizer.load_state_dict(saved)
    saved["state"][0][name].view(-1)[0] = value
    with pytest.raises(ValueError, match=said):
        optimizer.load_state_dict(saved)
