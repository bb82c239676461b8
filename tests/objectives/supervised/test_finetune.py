"""Supervised training: its loss by hand, mixing as a function of the batch's number, and weights from a file."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score
from timm.data import Mixup
from torch import Tensor
from torchvision.io import encode_png

import ssmpretrain
from ssmpretrain.callbacks import EMA
from ssmpretrain.datamodules import ImageShards
from ssmpretrain.datamodules.shards.pack import ShardWriter
from ssmpretrain.evaluation.accuracy import Accuracy
from ssmpretrain.objectives import Finetune
from ssmpretrain.objectives.supervised.mixing import mix
from ssmpretrain.training.optim.adamw import AdamW
from ssmpretrain.training.optim.schedules import Cosine

SMALL = {"img_size": 32, "depth": 2}
PNG = bytes(encode_png(torch.zeros(3, 8, 8, dtype=torch.uint8)).tolist())


def finetune(**arguments: Any) -> Finetune:
    settings = {"encoder": "test_vim", "encoder_args": SMALL, "num_classes": 7, "schedule": Cosine(warmup_epochs=0)}
    return Finetune(**{**settings, **arguments})


@pytest.fixture
def data(tmp_path: Path, write_shard: Callable[..., Path]) -> ImageShards:
    """13 images, in batches of 4."""
    shard = str(write_shard(tmp_path / "train.tar", count=13))
    return ImageShards(train=shard, val=shard, image_size=32, batch_size=4, num_workers=0)


def trainer(tmp_path: Path, **settings: Any) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults = {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False, "default_root_dir": tmp_path}
    return Trainer(**{**defaults, **quiet, "max_epochs": 1, "num_sanity_val_steps": 0, **settings})


def saved_run(tmp_path: Path, data: ImageShards, model: Finetune, **settings: Any) -> Path:
    run = trainer(tmp_path, **settings)
    run.fit(model, datamodule=data)
    run.save_checkpoint(tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


# The loss


def test_smoothed_cross_entropy_by_hand() -> None:
    model = finetune(num_classes=4, label_smoothing=0.2)
    logits = torch.tensor([[math.log(5.0), 0.0, 0.0, 0.0]])  # probabilities 5/8 and three times 1/8
    by_hand = -(0.85 * math.log(5 / 8) + 3 * 0.05 * math.log(1 / 8))
    assert model.loss(logits, torch.tensor([0])).item() == pytest.approx(by_hand)


def test_loss_of_a_mixture_by_hand() -> None:
    model = finetune(num_classes=4, label_smoothing=0.2)
    logits = torch.tensor([[math.log(5.0), 0.0, 0.0, 0.0]] * 2).bfloat16()
    targets = torch.tensor([[0.7, 0.3, 0, 0], [0, 0, 0, 1.0]])  # soft targets are smoothed by what made them
    log_odds = logits.float()[0, 0].item()
    log_sum = math.log(math.exp(log_odds) + 3)
    by_hand = ((0.7 * (log_sum - log_odds) + 0.3 * log_sum) + log_sum) / 2
    loss = model.loss(logits, targets)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(by_hand, rel=1e-6)


def test_one_step_lowers_the_loss_on_a_fixed_batch() -> None:
    torch.manual_seed(0)
    model, images, labels = finetune(), torch.randn(8, 3, 32, 32), torch.arange(8) % 7
    optimizer = AdamW(lr_per_256=1e-2).build(model, 256)
    before = model.loss(model(images), labels)
    before.backward()
    optimizer.step()
    assert model.loss(model(images), labels) < before


# Mixing


def mixed(numbers: tuple[int, ...], **settings: Any) -> tuple[Tensor, Tensor]:
    images, labels = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8), torch.arange(4)
    return mix(Mixup(**{"num_classes": 4, "label_smoothing": 0, **settings}), images, labels, numbers)


def test_mixup_blends_each_image_and_its_label_with_its_mirror_place() -> None:
    images, targets = mixed((0, 0, 0, 0), mixup_alpha=1.0)
    share = targets[0, 0]
    assert 0 < share < 1 and torch.allclose(targets.sum(1), torch.ones(4))
    expected = share * torch.arange(4.0) + (1 - share) * torch.arange(4.0).flip(0)
    torch.testing.assert_close(images[:, 0, 0, 0], expected)


def test_cutmix_pastes_a_rectangle_whose_area_is_the_mirror_labels_share() -> None:
    images, targets = mixed((0, 0, 1, 0), mixup_alpha=0.0, cutmix_alpha=1.0)
    pasted = (images[0, 0] == 3).float().mean()
    assert 0 < pasted < 1 and torch.allclose(targets[0], torch.tensor([1 - pasted, 0, 0, pasted]))


def test_the_mixture_depends_on_seed_epoch_batch_and_rank_and_on_nothing_else() -> None:
    first = mixed((0, 1, 2, 3), mixup_alpha=0.8, cutmix_alpha=1.0)
    np.random.rand(5)
    again = mixed((0, 1, 2, 3), mixup_alpha=0.8, cutmix_alpha=1.0)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for place in range(4):
        other = mixed(tuple(number + (place == i) for i, number in enumerate((0, 1, 2, 3))), mixup_alpha=0.8)
        assert not torch.equal(other[1], mixed((0, 1, 2, 3), mixup_alpha=0.8)[1]), place


def test_the_draws_of_a_run_follow_its_seed_and_the_number_of_the_batch(
    tmp_path: Path, data: ImageShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws: list[Sequence[int]] = []

    def note(mixup: Mixup, images: Tensor, labels: Tensor, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        draws.append(tuple(numbers))
        return images, labels

    monkeypatch.setattr("ssmpretrain.objectives.supervised.finetune.mix", note)
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2).fit(finetune(cutmix=1.0), datamodule=data)
    assert draws == [(7, epoch, batch, 0) for epoch in range(2) for batch in range(2)]


def test_mixing_leaves_numpys_generator_and_the_batch_as_they_were() -> None:
    np.random.seed(3)
    expected = np.random.rand(2)
    np.random.seed(3)
    values = [np.random.rand()]
    images = torch.arange(4.0).view(4, 1, 1, 1).repeat(1, 3, 8, 8)
    kept = images.clone()
    mix(Mixup(mixup_alpha=1.0, num_classes=4), images, torch.arange(4), (0,))
    values.append(np.random.rand())
    assert values == expected.tolist() and torch.equal(images, kept)


def test_a_probability_of_zero_mixes_nothing_but_smooths() -> None:
    images, targets = mixed((0, 0, 0, 0), mixup_alpha=0.8, prob=0.0, label_smoothing=0.4)
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(targets[0], torch.tensor([0.7, 0.1, 0.1, 0.1]))


# Training


def gradients(model: Finetune, batches: list[Tensor], tmp_path: Path) -> list[Tensor]:
    """Of one optimizer step over these batches."""

    class Loader(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(batches)

        def __getitem__(self, index: int) -> dict[str, Any]:
            images = batches[index]
            return {"image": images, "label": images[:, 0, 0, 0].gt(0).long(), "key": ["x"] * len(images)}

    taken: list[Tensor] = []
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), 0.0)  # type: ignore[assignment]
    model.on_before_optimizer_step = lambda optimizer: taken.extend(p.grad.clone() for p in model.parameters())  # type: ignore[assignment]
    loader = torch.utils.data.DataLoader(Loader(), batch_size=None)
    trainer(tmp_path, accumulate_grad_batches=len(batches), limit_val_batches=0, precision="64-true").fit(model, loader)
    return taken


def test_two_accumulated_batches_of_8_have_the_gradient_of_one_of_16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images, model = torch.randn(16, 3, 32, 32, dtype=torch.float64), finetune(label_smoothing=0.1)
    whole = gradients(model, [images], tmp_path)
    halves = gradients(model, list(images.split(8)), tmp_path)
    assert len(whole) == len(halves) > 0
    for one, two in zip(whole, halves, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def test_channels_last_changes_the_strides_and_not_the_result() -> None:
    logits = []
    for channels_last in (False, True):
        torch.manual_seed(0)
        model = finetune(encoder="test_convnext", encoder_args={}, channels_last=channels_last).eval()
        logits.append(model(torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)))
        strided = [p for p in model.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
        assert strided and all(p.is_contiguous(memory_format=torch.channels_last) == channels_last for p in strided)
    torch.testing.assert_close(*logits)


@pytest.mark.parametrize(
    "encoder", ["test_vim", "test_vmamba", "test_vmamba2", "test_arm", "test_vit", "test_mambaout"]
)
def test_every_kind_of_encoder_trains_in_bf16_with_all_that_is_offered(
    encoder: str, tmp_path: Path, data: ImageShards
) -> None:
    model = Finetune(
        encoder, {"drop_path_rate": 0.1}, num_classes=7, head_init_std=2e-5, layer_decay=0.65, mixup=0.8, cutmix=1.0,
        label_smoothing=0.1,
    )  # fmt: skip
    before = [parameter.detach().clone() for parameter in model.encoder.get_classifier().parameters()]
    run = trainer(tmp_path, precision="bf16-mixed", accumulate_grad_batches=2, callbacks=[EMA(0.5)])
    run.fit(model, datamodule=data)
    assert math.isfinite(run.callback_metrics["train/loss"]) and run.global_step == 1
    after = model.encoder.get_classifier().parameters()
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert all(parameter.isfinite().all() for parameter in model.parameters())


# Validation


def recomputed(encoder: torch.nn.Module, data: ImageShards) -> dict[str, float]:
    """By scikit-learn, one image after the other."""
    batches = list(data.val_dataloader())
    images, labels = (torch.cat([batch[name] for batch in batches]) for name in ("image", "label"))
    with torch.no_grad():
        logits = torch.cat([encoder.eval()(image[None]) for image in images])
    odds, classes = logits.double().softmax(1).numpy(), list(range(logits.shape[1]))
    return {
        "val/loss": log_loss(labels, odds, labels=classes),
        "val/top1": accuracy_score(labels, odds.argmax(1)),
        "val/top5": top_k_accuracy_score(labels, odds, k=5, labels=classes),
    }


def test_validation_equals_scikit_learns_numbers(tmp_path: Path, data: ImageShards) -> None:
    torch.manual_seed(1)
    model, run = finetune(), trainer(tmp_path)
    (metrics,) = run.validate(model, datamodule=data, verbose=False)
    assert metrics == pytest.approx(recomputed(model.encoder, data), rel=1e-5)


def test_two_processes_with_uneven_parts_give_the_numbers_of_one(tmp_path: Path, data: ImageShards) -> None:
    script = tmp_path / "fit.py"
    script.write_text(
        "import json, sys\n"
        "from lightning.pytorch import Trainer, seed_everything\n"
        "from ssmpretrain.datamodules import ImageShards\n"
        "from ssmpretrain.objectives import Finetune\n"
        "seed_everything(1)\n"
        f"shard = {str(tmp_path / 'train.tar')!r}\n"
        "data = ImageShards(train=shard, val=shard, image_size=32, batch_size=4, num_workers=0)\n"
        f"model = Finetune('test_vim', {SMALL}, num_classes=7, mixup=0.8)\n"
        "trainer = Trainer(accelerator='cpu', devices=2, strategy='ddp', max_epochs=1, logger=False,\n"
        "    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)\n"
        "trainer.fit(model, datamodule=data)\n"
        f"trainer.save_checkpoint({str(tmp_path / 'two.ckpt')!r})\n"
        "if trainer.is_global_zero:\n"
        "    print('METRICS', json.dumps({k: v.item() for k, v in trainer.callback_metrics.items()}))\n"
    )
    here = {**os.environ, "PYTHONPATH": str(Path(ssmpretrain.__file__).parents[1])}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, env=here)
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("METRICS")]
    metrics = json.loads(line.removeprefix("METRICS"))
    expected = recomputed(ssmpretrain.load_encoder(tmp_path / "two.ckpt"), data)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_accuracies_by_hand() -> None:
    accuracy = Accuracy("cpu")
    logits = torch.arange(7.0).repeat(3, 1)  # class 6 before 5 before 4 ...
    accuracy.add(logits[:2], torch.tensor([6, 2]))
    accuracy.add(logits[2:], torch.tensor([1]))
    result = accuracy.result(lambda part: part * 10)  # ten processes of the same
    assert {name: result[name].item() for name in ("top1", "top5")} == pytest.approx({"top1": 1 / 3, "top5": 2 / 3})
    assert Accuracy("cpu").result(lambda part: part) == {}


def test_top5_of_three_classes_is_1() -> None:
    accuracy = Accuracy("cpu")
    accuracy.add(torch.zeros(4, 3), torch.tensor([0, 1, 2, 2]))
    assert accuracy.result(lambda part: part)["top5"] == 1


# From a file and back


def test_a_run_comes_back_as_an_encoder_with_its_logits(tmp_path: Path, data: ImageShards) -> None:
    model = finetune(optimizer=AdamW(lr_per_256=0.5))
    path = saved_run(tmp_path, data, model, callbacks=[EMA(0.5)])
    images = torch.randn(2, 3, 32, 32)
    averaged, trained = (ssmpretrain.load_encoder(path, ema=ema).eval()(images) for ema in (True, False))
    assert torch.equal(averaged, model.eval()(images)) and not torch.equal(averaged, trained)


@pytest.mark.parametrize(("num_classes", "taken"), [(7, True), (5, False)])
def test_a_head_is_taken_over_if_it_has_as_many_classes(
    num_classes: int, taken: bool, tmp_path: Path, data: ImageShards
) -> None:
    first = finetune(optimizer=AdamW(lr_per_256=0.5))
    path = saved_run(tmp_path, data, first)
    second = Finetune(init_from=str(path), num_classes=num_classes, head_init_std=2e-5)
    assert (second.encoder_name, second.encoder_args["depth"]) == ("test_vim", 2)
    assert second.hparams["encoder"] == "test_vim" and second.hparams["encoder_args"]["depth"] == 2
    weight = second.encoder.head.weight
    assert weight.shape[0] == num_classes
    assert torch.equal(weight, first.encoder.head.weight) if taken else weight.std() < 3e-5
    assert set(second.encoder.load_report.fresh) == (set() if taken else {"head.weight", "head.bias"})
    blocks = (model.encoder.layers[1].mixer.in_proj.weight for model in (first, second))
    assert torch.equal(*blocks)


def test_other_images_than_those_of_the_file_get_a_resized_position_embedding(
    tmp_path: Path, data: ImageShards, write_shard: Callable[..., Path]
) -> None:
    path = saved_run(tmp_path, data, finetune())
    model = Finetune(init_from=str(path), num_classes=7)
    shard = str(write_shard(tmp_path / "wide.tar", size=64))
    wide = ImageShards(train=shard, image_size=64, batch_size=2, num_workers=0)
    trainer(tmp_path, max_steps=1).fit(model, datamodule=wide)
    assert model.encoder.load_report.resized == ("pos_embed",)
    assert model.encoder.patch_embed.img_size == (64, 64) and model.encoder_args["img_size"] == [64, 64]


def test_a_vit_that_pools_begins_the_norm_of_the_pooled_afresh_as_mae_does(tmp_path: Path, data: ImageShards) -> None:
    path = saved_run(tmp_path, data, finetune(encoder="test_vit", encoder_args={}))
    report = Finetune(init_from=str(path), encoder_args={"global_pool": "avg"}, num_classes=5).encoder.load_report
    assert set(report.fresh) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}


def test_fresh_heads_are_drawn_as_wide_as_asked_and_others_are_the_encoders_own() -> None:
    assert finetune().encoder.head.weight.std() > 1e-2
    assert 1e-5 < finetune(head_init_std=2e-5).encoder.head.weight.std() < 3e-5


# Refusals


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("layer_decay", 0.0), ("layer_decay", 1.1), ("mixup", -0.1), ("cutmix", -1.0), ("mixup_prob", 1.5),
        ("mixup_switch_prob", -0.1), ("label_smoothing", 1.0), ("head_init_std", 0.0), ("num_classes", 0),
        ("mixup", math.nan),
    ],
)  # fmt: skip
def test_an_argument_out_of_range_is_named(argument: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"Finetune: {argument} .*got {value}"):
        finetune(**{argument: value})


def test_neither_encoder_nor_file_is_refused() -> None:
    with pytest.raises(ValueError, match=r"by its name or from a checkpoint; got neither.*init_from"):
        Finetune()


@pytest.mark.parametrize(
    ("count", "labels", "message"),
    [
        (4, 1, r"labels are from 0 to 0; got label 1 of .*num_classes"),
        (3, 2, r"mixup and cutmix pair.*got a batch of 3"),
    ],
)
def test_what_the_data_brings_is_refused_in_words(
    count: int, labels: int, message: str, tmp_path: Path, write_shard: Callable[..., Path]
) -> None:
    shard = str(write_shard(tmp_path / "train.tar"))
    images = ImageShards(train=shard, image_size=32, batch_size=count, num_workers=0)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).fit(finetune(num_classes=labels, mixup=0.8), datamodule=images)


def test_an_image_without_a_label_is_named(tmp_path: Path) -> None:
    batch = {"image": torch.zeros(2, 3, 32, 32), "label": torch.tensor([1, -1]), "key": ["a", "b"]}
    with pytest.raises(ValueError, match=r"got none of b\. Label the data"):
        finetune().on_before_batch_transfer(batch, 0)


def test_classes_are_not_an_argument_of_the_encoder() -> None:
    with pytest.raises(ValueError, match=r"encoder_args takes no num_classes; set model\.num_classes"):
        finetune(encoder_args={"num_classes": 4})


def test_layer_decay_needs_an_encoder_that_names_its_layers() -> None:
    from ssmpretrain.training.optim.layer_decay import layer_numbers

    with pytest.raises(ValueError, match=r"group_matcher.*got none in Linear"):
        layer_numbers(torch.nn.Linear(2, 2))


# What the labels mean


def of_classes(folder: Path, data: ImageShards, names: str) -> ImageShards:
    """The shard of two classes again, beside a list of the names; its labels are 0 and 1."""
    folder.mkdir()
    (folder / "train.tar").symlink_to(data.train)
    (folder / "classes.json").write_text(json.dumps(list(names)))
    shard = str(folder / "train.tar")
    return ImageShards(train=shard, val=shard, image_size=32, batch_size=4, num_workers=0)


def validated_labels(data: ImageShards) -> list[int]:
    return torch.cat([batch["label"] for batch in data.val_dataloader()]).tolist()


def test_a_checkpoint_says_its_classes_and_validation_is_numbered_by_them(tmp_path: Path, data: ImageShards) -> None:
    path = saved_run(tmp_path, of_classes(tmp_path / "ab", data, "ab"), finetune(num_classes=2))
    assert torch.load(path, weights_only=True)["classes"] == ["a", "b"]
    swapped = of_classes(tmp_path / "ba", data, "ba")
    trainer(tmp_path).validate(finetune(num_classes=2), swapped, ckpt_path=path, weights_only=True)
    assert swapped.classes == ["a", "b"] and validated_labels(swapped) == [
        1 - label for label in validated_labels(data)
    ]
    with pytest.raises(
        ValueError, match=r"among those of the run's checkpoint \(a, b\); got c, which the latter lacks"
    ):
        other = of_classes(tmp_path / "ac", data, "ac")
        trainer(tmp_path).validate(finetune(num_classes=2), other, ckpt_path=path, weights_only=True)
    trainer(tmp_path).validate(finetune(num_classes=2), data, ckpt_path=path, weights_only=True)  # of no list


@pytest.mark.parametrize("exported", [False, True])
def test_a_head_that_is_taken_over_keeps_its_classes(
    exported: bool, tmp_path: Path, data: ImageShards, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved_run(tmp_path, of_classes(tmp_path / "ab", data, "ab"), finetune(num_classes=2))
    if exported:
        ssmpretrain.save_encoder(ssmpretrain.load_encoder(path), tmp_path / "x.safetensors")
        path = tmp_path / "x.safetensors"
    settings: dict[str, Any] = {"init_from": str(path), "num_classes": 2, "head_init_std": None}
    swapped, other = of_classes(tmp_path / "ba", data, "ba"), of_classes(tmp_path / "bc", data, "bc")
    model, renewed = finetune(**settings), finetune(**settings)
    taken = model.encoder.get_classifier().weight.clone()

    trainer(tmp_path).validate(model, swapped)
    assert swapped.classes == ["a", "b"] and torch.equal(model.encoder.get_classifier().weight, taken)

    run = trainer(tmp_path, max_steps=1)
    run.fit(renewed, other)
    assert other.classes == ["b", "c"] and "the data has the class c, which the head of" in caplog.text
    trained = renewed.encoder.get_classifier().weight.clone()
    assert (trained - taken).abs().max() > 1e-3  # one step moves it by less
    run.validate(renewed, other)
    assert torch.equal(renewed.encoder.get_classifier().weight, trained)


def test_a_larger_head_is_named_unless_it_is_the_checkpoints(
    tmp_path: Path, data: ImageShards, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved_run(tmp_path, of_classes(tmp_path / "abc", data, "abc"), finetune(num_classes=3))
    fewer, line = of_classes(tmp_path / "ca", data, "ca"), "the data has 2 classes, the head 3"
    trainer(tmp_path).validate(finetune(num_classes=3), fewer, ckpt_path=path, weights_only=True)
    trainer(tmp_path, max_steps=2).fit(finetune(num_classes=3), fewer, ckpt_path=path, weights_only=True)
    assert fewer.classes == ["a", "b", "c"] and line not in caplog.text
    trainer(tmp_path, max_steps=1).fit(finetune(num_classes=3), of_classes(tmp_path / "again", data, "ca"))
    assert line in caplog.text


def test_labels_that_cannot_be_read_end_a_supervised_run_before_its_first_step(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "words") as writer:
        for number in range(8):
            writer.write(str(number), {"png": PNG, "cls": b"cat"})
    data = ImageShards(str(tmp_path / "words-000000.tar"), image_size=32, batch_size=4, num_workers=0)
    with pytest.raises(ValueError, match=r"none of 8 samples tried can be used: 8 bad labels .*; got 'cat'"):
        trainer(tmp_path).fit(finetune(), data)
    (tmp_path / "classes.json").write_text('["dog", "cat"]')
    data = ImageShards(str(tmp_path / "words-000000.tar"), image_size=32, batch_size=4, num_workers=0)
    trainer(tmp_path, max_steps=1).fit(finetune(), data)
