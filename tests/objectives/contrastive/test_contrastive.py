"""Contrastive objectives: accumulated batches act as one large batch, and the temperature stays in its bounds."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from pairs import TEXT, VIM, Pairs, apart, fit, tiny
from torch import Tensor

from ssmpretrain.callbacks import EMA
from ssmpretrain.objectives import CLIP, MAECLIP
from ssmpretrain.objectives.contrastive import contrastive
from ssmpretrain.objectives.contrastive.head import MAX_LOGIT_SCALE, ContrastiveHead
from ssmpretrain.training.stopping.non_finite import NonFiniteGuard

ROUNDING = 2e-6  # float32: sums over eight pairs in another order, 6e-8 a rounding
LATER = 1e-5  # after steps of AdamW, which divide small gradients by their own size


# Accumulation


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": "siglip"},
        {"encoder": "test_vmamba", "encoder_args": {}},
        {"encoder": "test_vit", "encoder_args": {}},
        {"lock_image": True},
        {"text": replace(TEXT, kind="mamba")},
        {"text": replace(TEXT, locked=True)},
    ],
)
def test_accumulated_batches_have_the_loss_and_the_gradient_of_the_large_batch(changes: dict[str, Any]) -> None:
    large = fit(tiny(CLIP, **changes), Pairs(8))
    small = fit(tiny(CLIP, **changes), Pairs(2), accumulate_grad_batches=4)
    assert len(small.steps) == len(large.steps) == 3
    assert apart(small.steps[0], large.steps[0]) < ROUNDING
    assert apart(dict(enumerate(small.losses)), dict(enumerate(large.losses))) < LATER


def test_the_last_step_of_an_epoch_may_have_fewer_batches() -> None:
    large = fit(tiny(CLIP), Pairs(6, 6, steps=1))
    small = fit(tiny(CLIP), Pairs(2, 6, steps=1), accumulate_grad_batches=4)
    assert apart(small.steps[0], large.steps[0]) < ROUNDING
    assert small.losses == pytest.approx(large.losses, rel=ROUNDING)


DRAWS: dict[str, Any] = {"encoder_args": {**VIM, "drop_path_rate": 0.5}, "mask_ratio": 0.5}


def test_masks_and_drop_path_are_drawn_alike_when_work_is_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    again = fit(tiny(CLIP, **DRAWS), Pairs(2), accumulate_grad_batches=4)
    monkeypatch.setattr(contrastive, "recomputed", lambda encode, x, tower: encode(x))
    kept = fit(tiny(CLIP, **DRAWS), Pairs(2), accumulate_grad_batches=4)
    assert again.losses == kept.losses and all(
        torch.equal(step[name], value) for step, other in zip(again.steps, kept.steps, strict=True)
        for name, value in other.items()
    )  # fmt: skip


def test_bfloat16_accumulates_as_float32_does(monkeypatch: pytest.MonkeyPatch) -> None:
    large = fit(tiny(CLIP), Pairs(8), precision="bf16-mixed")
    small = fit(tiny(CLIP), Pairs(2), precision="bf16-mixed", accumulate_grad_batches=4)
    assert small.losses[0] == pytest.approx(large.losses[0], rel=ROUNDING)  # each pair is computed for itself
    assert apart(small.steps[0], large.steps[0]) < 2**-7  # a weight's gradient is a sum of eight in bfloat16


class Stop(Callback):
    """Raises in the middle of the first step."""

    def on_train_batch_end(self, *args: Any) -> None:
        raise InterruptedError


def test_a_run_that_was_stopped_between_batches_leaves_none_to_the_next() -> None:
    model = tiny(CLIP)
    with pytest.raises(InterruptedError):
        fit(model, Pairs(2), Stop(), accumulate_grad_batches=4)
    assert (
        fit(model, Pairs(2), accumulate_grad_batches=4).losses
        == fit(tiny(CLIP), Pairs(8)).losses[:0] + fit(tiny(CLIP), Pairs(2), accumulate_grad_batches=4).losses
    )


class Spoil(Callback):
    """Makes one image of the second step NaN."""

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 5:
            batch["image"] = batch["image"].clone()
            batch["image"][0] = torch.nan


@pytest.mark.parametrize("cls", [CLIP, MAECLIP])
def test_a_nan_in_one_of_the_batches_skips_the_step_and_nothing_else(cls: type[Any]) -> None:
    guard, settings = NonFiniteGuard(), {"decoder_embed_dim": 32} if cls is MAECLIP else {}
    model = tiny(cls, **settings)
    fit(model, Pairs(2), Spoil(), EMA(0.5), guard, accumulate_grad_batches=4)
    assert guard.skipped == 1 and all(value.isfinite().all() for value in model.state_dict().values())


def test_the_towers_are_computed_in_parts_and_the_contrast_is_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    contrasted: list[tuple[int, ...]] = []
    loss = ContrastiveHead.loss
    monkeypatch.setattr(
        ContrastiveHead, "loss", lambda self, *x: contrasted.append((*x[0].shape, *x[1].shape)) or loss(self, *x)
    )
    model, seen = tiny(CLIP), []
    model.encoder.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    fit(model, Pairs(2, steps=1), accumulate_grad_batches=4)
    assert contrasted == [(8, 16, 8, 16)] and seen == [2] * 8  # once for the loss and once for its gradient


# Every parameter learns


@pytest.mark.parametrize(
    ("encoder", "args", "size"),
    [
        ("test_vim", {"patch_size": 8}, 32),
        ("test_vim", {"patch_size": 8, "class_token": "double"}, 32),
        ("test_vim", {"patch_size": 8, "class_token": "none"}, 32),
        ("test_vim", {"patch_size": 8, "global_pool": "avg"}, 32),
        ("test_vmamba", {}, 64),
        ("test_arm", {"patch_size": 8}, 64),
        ("test_vit", {}, 64),
        ("test_vit", {"global_pool": "avg"}, 64),
        ("test_vit", {"global_pool": "map"}, 64),
        ("test_convnext", {}, 64),
        ("test_mambaout", {}, 64),
        ("test_resnet", {}, 64),
    ],
)
def test_every_trainable_parameter_of_every_family_gets_a_gradient(
    encoder: str, args: dict[str, Any], size: int
) -> None:
    model = tiny(CLIP, encoder=encoder, encoder_args=args)
    (step,) = fit(model, Pairs(4, 4, steps=1, size=size)).steps
    assert step.keys() == {name for name, _ in model.named_parameters()}  # or DDP waits for what is left


# Temperature and precision


def test_the_factor_stops_at_1_and_at_100_and_comes_back() -> None:
    model, right = tiny(CLIP, init_logit_scale=MAX_LOGIT_SCALE - 0.01), 0.1 * torch.eye(2, 4) + 0.4
    model.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    optimizer, factors = torch.optim.SGD([model.logit_scale], lr=10.0), []

    def closure(text: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = model.contrastive.loss(right, text)
        loss.backward()
        return loss

    for text in (right, right, right.flip(0), right.flip(0), right):  # the loss asks for more, then for less
        model.optimizer_step(0, 0, optimizer, partial(closure, text))
        factors.append(model.logit_scale.exp().item())
    assert factors[:3] == pytest.approx([100, 100, 1]) and 1 == factors[3] < factors[4] < 100


def test_the_average_of_the_weights_keeps_the_bounds_too() -> None:
    model = tiny(CLIP, init_logit_scale=MAX_LOGIT_SCALE)
    fit(model, Pairs(8), EMA(0.5))
    assert 1 <= model.logit_scale.exp().item() <= 100.001


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_loss_is_of_float32_and_finite_in_bfloat16_at_the_largest_factor(kind: str) -> None:
    model = tiny(CLIP, loss=kind, init_logit_scale=MAX_LOGIT_SCALE)
    batch = next(iter(Pairs(8).train_dataloader()))
    with torch.autocast("cpu", torch.bfloat16):
        image, text = model.encode_image(batch["image"]), model.encode_text(model.tokenizer(batch["text"])[0])
        loss = model.contrastive.loss(image, -image if kind == "clip" else image)
    loss.backward()
    assert {image.dtype, text.dtype, loss.dtype} == {torch.float32} and loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    with torch.autocast("cpu", enabled=False):
        assert loss.item() == model.contrastive.loss(image, -image if kind == "clip" else image).item()
