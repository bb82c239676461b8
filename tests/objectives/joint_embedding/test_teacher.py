"""The teacher: its values, its mode, its place in a run, and its restoration."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from taught_run import Twin, TwoViews, fit
from torch import Tensor, nn

import ssmpretrain
from ssmpretrain.callbacks import EMA
from ssmpretrain.objectives.joint_embedding import Teacher
from ssmpretrain.training.checkpoints.saving import Checkpoints
from ssmpretrain.training.optim.ramps import Ramp
from ssmpretrain.training.stopping.non_finite import NonFiniteGuard


def pair(name: str, **args: Any) -> tuple[nn.Module, nn.Module, Teacher]:
    """A student's encoder and head, both in training mode, and a teacher made of them."""
    torch.manual_seed(0)
    encoder: Any = ssmpretrain.create_encoder(name, num_classes=0, **args)
    head = nn.Linear(encoder.num_features, 4)
    return encoder, head, Teacher(encoder, head)


def disturb(module: nn.Module) -> None:
    """Change every floating-point tensor of a module's state dict."""
    for value in module.state_dict().values():
        if value.is_floating_point():
            value += torch.rand(value.shape)


def test_every_tensor_is_the_average_of_the_formula() -> None:
    encoder, head, teacher = pair("test_vim", depth=2)
    expected = {name: value.double() for name, value in teacher.state_dict().items()}
    for momentum in (0.9, 0.25, 0.996):
        disturb(encoder)
        disturb(head)
        teacher.update(momentum, encoder, head)
        student = nn.ModuleDict({"encoder": encoder, "head": head}).state_dict()
        expected = {name: momentum * old + (1 - momentum) * student[name].double() for name, old in expected.items()}
    for name, value in teacher.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-7)


def test_momentum_0_copies_the_student_and_1_keeps_the_teacher() -> None:
    encoder, head, teacher = pair("test_vim", depth=2)
    before = copy.deepcopy(teacher.state_dict())
    disturb(encoder)
    teacher.update(1.0, encoder, head)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    teacher.update(0.0, encoder, head)
    assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in teacher.encoder.state_dict().items())


def test_running_statistics_are_averaged_and_counters_copied() -> None:
    encoder, head, teacher = pair("resnet10t")
    before = copy.deepcopy(teacher.encoder.state_dict())
    encoder(torch.randn(2, 3, 32, 32))
    teacher.update(0.75, encoder, head)
    for name, value in teacher.encoder.state_dict().items():
        student = encoder.state_dict()[name]
        if "running" in name:
            torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * student)
            assert not torch.equal(student, before[name])
        elif "num_batches" in name:
            assert value == student == 1


def test_a_tensor_that_two_layers_share_moves_once() -> None:
    layer = nn.Linear(2, 2, bias=False)
    encoder, head = nn.Identity(), nn.Sequential(layer, nn.GELU(), layer)
    teacher = Teacher(encoder, head)
    before = layer.weight.detach().clone()
    disturb(layer)
    teacher.update(0.75, encoder, head)
    torch.testing.assert_close(teacher.head[2].weight, 0.75 * before + 0.25 * layer.weight)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("test_vim", {"depth": 2, "img_size": 32, "drop_path_rate": 0.9}),
        ("test_vmamba", {"drop_path_rate": 0.9}),
        ("resnet10t", {"drop_rate": 0.5}),
        pytest.param("mambaout_femto", {"drop_path_rate": 0.9}, marks=pytest.mark.slow),
    ],
)
def test_the_teacher_is_in_evaluation_mode_whatever_mode_its_parent_is_set_to(name: str, args: Any) -> None:
    encoder, head, teacher = pair(name, **args)
    parent = nn.ModuleDict({"encoder": encoder, "head": head, "teacher": teacher})
    parent.train()
    assert encoder.training and not any(module.training for module in teacher.modules())
    before, images = copy.deepcopy(teacher.state_dict()), torch.randn(2, 3, 32, 32)
    seen = teacher(images)
    encoder.eval()
    assert torch.equal(seen.vector, teacher(images).vector) and torch.equal(
        seen.vector, Teacher(encoder, head)(images)[0]
    )
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_the_teacher_has_no_gradient() -> None:
    _, _, teacher = pair("test_vim", depth=2, img_size=32)
    images = torch.randn(1, 3, 32, 32, requires_grad=True)
    seen = teacher(images)
    assert not any(one.requires_grad for one in (*seen, teacher.head(seen.vector), *teacher.parameters()))


def test_the_first_tensor_without_a_partner_is_named() -> None:
    encoder, head, teacher = pair("test_vim", depth=2)
    with pytest.raises(ValueError, match=r"got head\.bias with shape \(4,\) in the teacher and none in the student"):
        teacher.update(0.9, encoder, nn.Linear(head.in_features, 4, bias=False))
    with pytest.raises(ValueError, match=r"got head\.weight with shape .4, .* in the teacher and shape .5, .* in"):
        teacher.update(0.9, encoder, nn.Linear(head.in_features, 5))
    with pytest.raises(ValueError, match=r"got encoder\.layers\.2\.\S+ with none in the teacher and shape"):
        teacher.update(0.9, ssmpretrain.create_encoder("test_vim", num_classes=0, depth=3), head)
    with pytest.raises(ValueError, match=r"momentum is in \[0, 1\]; got 1.5"):
        teacher.update(1.5, encoder, head)


# In a run


class Steps(Callback):
    """Keep student and teacher after each optimizer step, when the other callbacks see them."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.decays: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.states.append(copy.deepcopy(pl_module.state_dict()))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.decays.append(optimizer.param_groups[0]["weight_decay"])

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == len(self.states):
            self.states.append(copy.deepcopy(pl_module.state_dict()))


def pairs_of(state: dict[str, Tensor]) -> list[tuple[str, Tensor, Tensor]]:
    """Name, teacher and student of each average."""
    named = {name: name.removeprefix("teacher.") for name in state if name.startswith("teacher.")}
    return [(name, state[name], state[theirs]) for name, theirs in named.items() if state[name].is_floating_point()]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_moves_after_each_optimizer_step_by_the_momentum_of_that_step(accumulate: int, tmp_path: Path) -> None:
    steps = Steps()
    fit(tmp_path, Twin(), steps, accumulate_grad_batches=accumulate)
    total = 8 // accumulate
    assert len(steps.states) == total + 1
    for i, (before, after) in enumerate(zip(steps.states, steps.states[1:], strict=False)):
        momentum = Ramp(0.5, 1.0).at(i, total, 1)
        for name, value, student in pairs_of(after):
            torch.testing.assert_close(value, momentum * before[name] + (1 - momentum) * student, rtol=1e-5, atol=1e-7)


class Poison(Callback):
    """Make the gradients of one step infinite."""

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.global_step == 2:
            next(pl_module.encoder.parameters()).grad.fill_(torch.inf)


def test_a_skipped_step_leaves_it_unchanged(tmp_path: Path) -> None:
    steps = Steps()
    fit(tmp_path, Twin(), Poison(), NonFiniteGuard(), steps)
    changed = [
        any(not torch.equal(before[name], value) for name, value, _ in pairs_of(after))
        for before, after in zip(steps.states, steps.states[1:], strict=False)
    ]
    assert changed == [True, True, False, *[True] * 5]


def test_a_checkpoint_holds_the_teacher_after_the_step_and_the_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    steps, options = Steps(), {"accumulate_grad_batches": 2, "precision": "bf16-mixed", "max_epochs": 3}
    data = TwoViews(count=6)
    torch.manual_seed(0)
    whole = Twin(clip_per_tensor=0.01)
    fit(tmp_path / "whole", whole, steps, Checkpoints(every_n_steps=1, keep=20), data=data, **options)
    for step in (2, 3, 7):  # within an epoch, at its end, in the last one
        path = tmp_path / "whole" / "checkpoints" / f"step-{step:09d}.ckpt"
        saved = torch.load(path, weights_only=True)["state_dict"]
        assert all(torch.equal(saved[name], value) for name, value in steps.states[step].items())
        continued = Twin(clip_per_tensor=0.01)
        fit(tmp_path / str(step), continued, data=data, resume=path, **options)
        assert all(torch.equal(value, whole.state_dict()[name]) for name, value in continued.state_dict().items())


def test_an_encoder_rebuilt_for_the_data_has_a_teacher_of_its_weights(tmp_path: Path) -> None:
    steps = Steps()
    model = Twin(momentum=Ramp(1.0, 1.0))
    assert model.teacher.encoder.pos_embed.shape[1] == 1 + (224 // 8) ** 2
    fit(tmp_path, model, steps, data=TwoViews(size=24), max_epochs=1)
    assert all(torch.equal(value, student) for _, value, student in pairs_of(steps.states[0]))
    assert model.teacher.encoder.pos_embed.shape[1] == 1 + (24 // 8) ** 2


def test_an_average_of_student_and_teacher_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"EMA: Twin averages its weights itself, as its teacher\. Leave EMA out\."):
        fit(tmp_path, Twin(), EMA())


# Momentum, temperature and clipping of a run


class Values(Callback):
    """Keep temperature, momentum and learning rate of each batch."""

    def __init__(self) -> None:
        self.values: list[tuple[float, float, float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        ramps = pl_module.temperature, pl_module.momentum
        self.values.append((*map(pl_module.value_of, ramps), trainer.optimizers[0].param_groups[0]["lr"]))


@pytest.mark.parametrize("count", [6, 12])
def test_a_run_with_another_global_batch_keeps_its_place_in_epochs(count: int, tmp_path: Path) -> None:
    """After 1 of 2 epochs of 6 steps the run goes on with 6 or 12 steps an epoch."""
    first = fit(tmp_path, Twin(), data=TwoViews(count=6), max_epochs=1)
    first.save_checkpoint(tmp_path / "half.ckpt")
    values, ramps = Values(), {"temperature": Ramp(0.04, 0.07, "linear", epochs=2)}
    fit(tmp_path, Twin(**ramps), values, data=TwoViews(count=count), resume=tmp_path / "half.ckpt")
    assert len(values.values) == count
    for i, (temperature, momentum, _) in enumerate(values.values):
        assert temperature == pytest.approx(0.04 + 0.03 * (1 + i / count) / 2)
        assert momentum == pytest.approx(Ramp(0.5, 1.0).at(count + i, 2 * count, count))


def test_a_ramp_longer_than_the_run_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="ssmpretrain"):
        fit(tmp_path, Twin(temperature=Ramp(0.04, 0.07, "linear", epochs=30)), max_epochs=1)
    assert "momentum: 0.5 to 1 by half a cosine over the run" in caplog.text
    assert (
        "the run ends at epoch 1, before temperature reaches 0.07 at epoch 30; set model.temperature.epochs"
        in caplog.text
    )


def test_clipping_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got model.clip_per_tensor 3.0 and trainer.gradient_clip_val 1.0"):
        fit(tmp_path, Twin(clip_per_tensor=3.0), gradient_clip_val=1.0)
    with pytest.raises(ValueError, match="Twin: clip_per_tensor is finite and above 0; got 0"):
        Twin(clip_per_tensor=0)


class Norms(Callback):
    """Keep the norms of the gradients when the optimizer takes them, and before they are clipped."""

    def __init__(self) -> None:
        self.before: list[list[float]] = []
        self.after: list[list[float]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.before.append(norms_of(pl_module))

    def on_before_zero_grad(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step:
            self.after.append(norms_of(pl_module))


def norms_of(module: nn.Module) -> list[float]:
    return [float(one.grad.double().norm()) for one in module.parameters() if one.grad is not None]


def test_each_tensor_is_clipped_by_its_own_norm(tmp_path: Path) -> None:
    norms = Norms()
    trainer = fit(tmp_path, Twin(clip_per_tensor=0.05), norms)
    for before, after in zip(norms.before, norms.after, strict=False):
        assert min(before) < 0.05 < max(before)
        assert after == pytest.approx([norm * min(1, 0.05 / (norm + 1e-6)) for norm in before], rel=1e-5)
    assert 0 < trainer.callback_metrics["train/clipped"] < 1
