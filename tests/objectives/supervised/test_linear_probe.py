"""The linear probe: frozen parts, heads that train independently, and results that can be recomputed."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.utils.data import DataLoader

import ssmpretrain
from ssmpretrain.cli import main
from ssmpretrain.objectives import LinearProbe
from ssmpretrain.training.optim.schedules import Cosine

CONSTANT = Cosine(warmup_epochs=0, final_fraction=1.0)


class Stripes(LightningDataModule):
    """Noise with a stripe whose place is the class: 4 classes, easy for a linear head on almost any features."""

    image_size, mean, std, crop_scale, train = 64, (0.5,) * 3, (0.25,) * 3, (1.0, 1.0), "stripes"

    def __init__(self, train: int = 96, val: int = 50, batch_size: int = 16, noise: float = 1.0) -> None:
        super().__init__()
        self.batch_size, self.sizes, self.noise = batch_size, {"train": train, "val": val}, noise

    def samples(self, split: str) -> list[dict[str, Any]]:
        generator = torch.Generator().manual_seed({"train": 0, "val": 1}[split])
        samples = []
        for number in range(self.sizes[split]):
            image, label = self.noise * torch.randn(3, 64, 64, generator=generator), number % 4
            image[label % 3, :, 16 * label : 16 * label + 16] += 1.0
            samples.append({"image": image, "label": label, "key": f"{split}{number}"})
        return samples

    def num_samples(self, split: str) -> int:
        return self.sizes[split]

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.samples("train"), self.batch_size, drop_last=True)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.samples("val"), self.batch_size)  # type: ignore[arg-type]


def probe(**changes: Any) -> LinearProbe:
    torch.manual_seed(0)
    settings = {"encoder": "test_vim", "encoder_args": {"img_size": 64}, "num_classes": 4, "schedule": CONSTANT}
    return LinearProbe(**settings | changes)  # type: ignore[arg-type]


def trainer(folder: Path, epochs: int = 1, **changes: Any) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary"), False)
    settings = {"accelerator": "cpu", "devices": 1, "max_epochs": epochs, "num_sanity_val_steps": 0}
    return Trainer(default_root_dir=folder, **settings | quiet | changes)  # type: ignore[arg-type]


def fit(model: LinearProbe, folder: Path, data: Stripes | None = None, epochs: int = 1, **changes: Any) -> Trainer:
    chosen = trainer(folder, epochs, **changes)
    chosen.fit(model, datamodule=data or Stripes())
    return chosen


def table(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "probe.json").read_text())
    return content


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


# What is frozen


@pytest.mark.parametrize(
    ("encoder", "encoder_args"),
    [
        ("test_vim", {"img_size": 64, "drop_path_rate": 0.5}),
        ("test_vit", {"img_size": 64, "drop_path_rate": 0.5, "proj_drop_rate": 0.5}),
        ("test_efficientnet", {"drop_path_rate": 0.5}),  # with batch norm inside
    ],
)
def test_encoder_keeps_every_bit_and_works_as_in_evaluation(
    encoder: str, encoder_args: dict[str, Any], tmp_path: Path
) -> None:
    model = probe(encoder=encoder, encoder_args=encoder_args)
    images = torch.randn(4, 3, 64, 64)
    before, heads, features = tensors(model.encoder), tensors(model.sweeps), model.eval().features(images)
    fit(model, tmp_path)
    model.train()
    assert not any(module.training for module in model.encoder.modules()) and model.sweeps.training
    assert all(torch.equal(value, model.features(images)[name]) for name, value in features.items())
    assert before.keys() == model.encoder.state_dict().keys()
    assert all(torch.equal(value, model.encoder.state_dict()[name]) for name, value in before.items())
    assert not any(torch.equal(value, model.sweeps.state_dict()[name]) for name, value in heads.items())
    assert not any(parameter.requires_grad for parameter in model.encoder.parameters())


def test_optimizer_holds_the_heads_alone_each_at_its_own_rate() -> None:
    model = probe(learning_rates=[0.1, 0.4], attentive=True, attentive_heads=4, attentive_learning_rates=[1e-3])
    groups = model.build_optimizer(512).param_groups
    assert [(group["lr"], group["weight_decay"], group["steps_with"]) for group in groups] == [
        (0.2, 0, "lars"), (0.2, 0, "sgd"), (0.8, 0, "lars"), (0.8, 0, "sgd"), (2e-3, 0, "adamw"),
    ]  # fmt: skip
    assert all(p.ndim > (group["steps_with"] == "lars") for group in groups for p in group["params"])
    held = {id(parameter) for group in groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.sweeps.parameters()}
    linear = [sweep for name, sweep in model.sweeps.items() if name != "attentive_1"]
    assert {id(p) for group in groups[2:4] for p in group["params"]} == {
        id(parameter) for sweep in linear for parameter in sweep.heads[1].parameters()
    }


# What a head is


def test_norm_uses_the_batch_in_training_and_what_it_has_seen_in_evaluation() -> None:
    sweep = probe(poolings=["mean"], learning_rates=[0.1]).sweeps["mean_1"]
    head = sweep.requires_grad_(False).heads[0]
    assert isinstance(head, nn.Linear) and not list(sweep.norm.parameters())
    assert head.bias.eq(0).all() and head.weight.std() == pytest.approx(0.01, rel=0.2)
    features = 5 + 3 * torch.randn(8, 32)
    centred = features - features.mean(0)
    normal = centred / (centred.square().mean(0) + 1e-6).sqrt()
    assert torch.allclose(sweep(features)[0], normal @ head.weight.T, atol=1e-5)
    seen_mean, seen_variance = 0.1 * features.mean(0), 0.9 + 0.1 * features.var(0)
    normal = (features - seen_mean) / (seen_variance + 1e-6).sqrt()
    assert torch.allclose(sweep.eval()(features)[0], normal @ head.weight.T, atol=1e-5)


def test_heads_of_a_sweep_are_the_heads_trained_alone(tmp_path: Path) -> None:
    """Rates a thousand times apart: whatever leaked from one head to another would show."""
    rates = [0.1, 100.0]
    together = probe(learning_rates=rates, last_blocks=[1, 2], attentive=True, attentive_heads=4)
    fit(together, tmp_path, epochs=2)
    for number, rate in enumerate(rates):
        alone = probe(learning_rates=[rate], poolings=["class"], last_blocks=[2])
        fit(alone, tmp_path, epochs=2)
        theirs = together.sweeps["class_2"].heads[number].state_dict()
        for name, value in alone.sweeps["class_2"].heads[0].state_dict().items():
            assert torch.allclose(value, theirs[name], rtol=1e-4, atol=1e-6), name


def test_every_head_gets_the_gradient_of_its_own_loss() -> None:
    model = probe(learning_rates=[0.1, 0.2], attentive=True, attentive_heads=4)
    batch = torch.utils.data.default_collate(Stripes().samples("train")[:16])
    model.log = lambda *_, **__: None  # type: ignore[method-assign]
    model.training_step(batch, 0).backward()
    heads = [head for sweep in model.sweeps.values() for head in sweep.heads]
    together = [parameter.grad for head in heads for parameter in head.parameters()]
    model.zero_grad()
    for logits, head in zip(model(batch["image"]), heads, strict=True):
        alone = torch.autograd.grad(nn.functional.cross_entropy(logits, batch["label"]), list(head.parameters()))
        for expected in alone:
            assert torch.allclose(together.pop(0), expected, rtol=1e-4, atol=1e-8)


def test_a_diverged_head_leaves_the_others_alone_and_stays_finite(tmp_path: Path) -> None:
    adamw = {"attentive": True, "attentive_heads": 4, "attentive_learning_rates": [1e-3, 1e7]}
    model, alone = (
        probe(learning_rates=[1.0, 1e7], poolings=["mean"], **adamw),
        probe(learning_rates=[1.0], poolings=["mean"]),
    )
    fit(model, tmp_path, epochs=5)
    assert [head["diverged"] for head in table(tmp_path)["heads"]] == [False, True, False, True]
    assert all(value.isfinite().all() for value in model.state_dict().values())
    fit(alone, tmp_path, epochs=5)
    assert torch.allclose(alone.sweeps["mean_1"].heads[0].weight, model.sweeps["mean_1"].heads[0].weight, atol=1e-5)


def test_a_step_lowers_the_loss_of_every_head() -> None:
    model = probe(learning_rates=[1.0, 8.0], attentive=True, attentive_heads=4)
    batch = torch.utils.data.default_collate(Stripes().samples("train")[:16])
    optimizer = model.build_optimizer(256)

    def losses() -> Tensor:
        logits = model(batch["image"])
        return torch.stack([nn.functional.cross_entropy(one, batch["label"]) for one in logits])

    before = losses()
    before.sum().backward()
    optimizer.step()
    assert (losses() < before).all()


def test_attentive_head_by_hand() -> None:
    model = probe(attentive=True, attentive_heads=1, attentive_learning_rates=[0.1])
    sweep = model.sweeps["attentive_1"].eval()
    (head,) = sweep.heads
    patches = torch.randn(2, 32, 6)  # as many channels as test_vim has
    tokens = (patches / (1 + 1e-6) ** 0.5).transpose(1, 2)
    score = (head.key(tokens) @ head.query[0]) / 32**0.5  # (B, L)
    attended = (score.softmax(1).unsqueeze(-1) * head.value(tokens)).sum(1)
    assert torch.allclose(sweep(patches)[0], head.classifier(attended), atol=1e-6)


def test_attentive_head_reads_the_patches_of_the_last_map() -> None:
    model = probe(attentive=True, attentive_heads=4).eval()
    images = torch.randn(2, 3, 64, 64)
    features = model.features(images)
    assert features["attentive_1"].shape == (2, 32, 16)
    assert torch.allclose(features["attentive_1"].mean(-1), features["mean_1"], atol=1e-6)


def test_heads_work_in_float32_under_bf16_mixed(tmp_path: Path) -> None:
    model = probe(learning_rates=[2.0])
    fit(model, tmp_path, precision="bf16-mixed")
    images = torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        features, logits = model.eval().features(images), model(images)
    assert not torch.equal(features["mean_1"], model.features(images)["mean_1"])  # the encoder's are bfloat16's
    exact = torch.cat([model.sweeps[name](vectors) for name, vectors in features.items()])
    assert logits.dtype == torch.float32 and torch.equal(logits, exact)
    assert table(tmp_path)["protocol"]["precision"] == "bf16-mixed"


# The numbers


def test_accuracy_is_that_of_logistic_regression_on_the_same_features(tmp_path: Path) -> None:
    """Both choose on the validation images, the one its rate and the other its penalty."""
    model = probe(poolings=["mean"], learning_rates=[2.0, 8.0, 32.0])
    data = Stripes(train=256, val=400, batch_size=32, noise=1.0)
    fit(model, tmp_path, data, epochs=10)
    sets = {}
    for split in ("train", "val"):
        batch = torch.utils.data.default_collate(data.samples(split))
        sets[split] = model.features(batch["image"])["mean_1"].numpy(), batch["label"].numpy()
    (train, train_labels), (val, labels) = sets["train"], sets["val"]
    train, val = (train - train.mean(0)) / train.std(0), (val - train.mean(0)) / train.std(0)
    judges = [LogisticRegression(C=C, max_iter=2000).fit(train, train_labels) for C in (0.01, 0.1, 1.0, 10.0)]
    expected = max(judge.score(val, labels) for judge in judges)
    assert 0.5 < expected < 0.98  # neither chance, which is 0.25, nor so easy that anything passes
    assert table(tmp_path)["best"]["top1"] == pytest.approx(expected, abs=0.03)


def test_counts_are_exact_with_a_last_batch_that_is_not_full(tmp_path: Path) -> None:
    model, data = probe(num_classes=9, learning_rates=[1e-3, 8.0]), Stripes(val=37, noise=4.0)
    chosen = fit(model, tmp_path, data)
    batch = torch.utils.data.default_collate(data.samples("val"))
    order = model.eval()(batch["image"]).argsort(dim=-1, descending=True)
    heads = table(tmp_path)["heads"]
    for head, ranked in zip(heads, order, strict=True):
        right = ranked == batch["label"][:, None]
        assert head["top1"] == int(right[:, 0].sum()) / 37
        assert head["top5"] == int(right[:, :5].sum()) / 37
    best = max(heads, key=lambda head: (head["top1"], head["top5"]))
    logged = chosen.logged_metrics
    assert table(tmp_path)["best"] == best
    assert (float(logged["val/top1"]), float(logged["val/top5"])) == pytest.approx((best["top1"], best["top5"]))
    for kind in ("mean_1", "class_1", "both_1"):
        highest = max(head["top1"] for head in heads if head["kind"] == kind)
        assert float(logged[f"val/top1_{kind}"]) == pytest.approx(highest)


def test_every_number_says_what_it_depends_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(probe(learning_rates=[2.0], last_blocks=[1, 3]), tmp_path, epochs=2)
    content = table(tmp_path)
    assert [(head["pooling"], head["last_blocks"], head["lr_per_256"]) for head in content["heads"]] == [
        (pooling, blocks, 2.0) for blocks in (1, 3) for pooling in ("mean", "class", "both")
    ]
    assert all(head["peak_lr"] == 2.0 * 16 / 256 for head in content["heads"])
    protocol = content["protocol"]
    assert protocol["encoder"] == "test_vim" and protocol["encoder_args"] == {"img_size": 64}
    assert (protocol["batch"], protocol["epochs"], protocol["steps"], protocol["steps_taken"]) == (16, 2, 12, 12)
    assert "affine=False" in protocol["normalisation"] and protocol["optimizer"] == {
        "kind": "LARS", "weight_decay": 0.0, "momentum": 0.9, "trust_coefficient": 0.001,
    }  # fmt: skip
    assert protocol["training"] == {
        "class": "Stripes", "images": 96, "image_size": 64, "mean": [0.5] * 3, "std": [0.25] * 3, "crop_scale": [1, 1],
    }  # fmt: skip
    assert protocol["validation"]["images"] == 50
    said = capsys.readouterr().out
    assert f"top-1 {content['best']['top1']:.2%}" in said and "(peak lr 0.125 at batch 16) for 2 epochs of 96" in said
    assert "test_vim with fresh weights; the best of 6 heads on these images" in said


def test_a_run_that_ends_early_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Stop(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.should_stop = True

    fit(probe(learning_rates=[2.0]), tmp_path, epochs=2, callbacks=[Stop()])
    assert "for 6 of 12 steps of 96 images" in capsys.readouterr().out


# Checkpoints


def test_validation_of_the_checkpoint_gives_the_numbers_of_the_end_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_shard: Callable[..., Path]
) -> None:
    monkeypatch.chdir(tmp_path)
    shard = str(write_shard(tmp_path / "x.tar", count=12, size=64))
    words = [
        "--model=ssmpretrain.objectives.LinearProbe", "--model.encoder=test_vim", "--model.num_classes=2",
        "--model.last_blocks=[1,2]", "--model.learning_rates=[0.5,5]", "--data=ssmpretrain.datamodules.ImageShards",
        f"--data.train={shard}", f"--data.val={shard}", "--data.image_size=64", "--data.batch_size=5",
        "--data.num_workers=0", "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.max_epochs=2",
    ]  # fmt: skip
    assert main(["fit", *words, "--run_dir=online"]) == 0
    online = table(tmp_path / "online")
    assert main(["validate", *words, "--run_dir=offline", "--ckpt_path=online/checkpoints/last.ckpt"]) == 0
    assert table(tmp_path / "offline") == online
    for name in ("online", "offline"):
        assert online["protocol"]["training"]["crop_scale"] == [0.2, 1.0], name
    encoder = ssmpretrain.load_encoder("online")
    saved = torch.load("online/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(encoder.state_dict()["norm_f.weight"], saved["encoder.norm_f.weight"])


class SaveAfterTheSecondEpoch(Callback):
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "x.ckpt")


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    settings = {"learning_rates": [2.0, 8.0], "schedule": Cosine(1), "attentive": True, "attentive_heads": 4}
    whole, resumed = probe(**settings), probe(**settings)
    fit(whole, tmp_path, epochs=3, callbacks=[SaveAfterTheSecondEpoch()])
    chosen = trainer(tmp_path, 3)
    chosen.fit(resumed, datamodule=Stripes(), ckpt_path=str(tmp_path / "x.ckpt"), weights_only=True)
    assert chosen.current_epoch == 3 and torch.load(tmp_path / "x.ckpt", weights_only=True)["global_step"] == 12
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_checkpoint_of_another_sweep_is_refused(tmp_path: Path) -> None:
    fit(probe(learning_rates=[2.0]), tmp_path).save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"made with learning_rates \[2.0\]; got \[3.0\]. Set model.learning_rates"):
        trainer(tmp_path).validate(probe(learning_rates=[3.0]), Stripes(), str(tmp_path / "x.ckpt"), weights_only=True)


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rates": []}, "learning_rates names one or more; got none"),
        ({"poolings": []}, "poolings names one or more; got none"),
        ({"last_blocks": []}, "last_blocks names one or more; got none"),
        ({"attentive_learning_rates": [-1]}, r"attentive_learning_rates are above 0; got \[-1\]"),
        ({"learning_rates": [0.1, 0.0]}, r"learning_rates are above 0; got \[0.1, 0.0\]"),
        ({"learning_rates": [0.1, 0.1]}, r"learning_rates are all different; got \[0.1, 0.1\]"),
        ({"poolings": ["max"]}, "poolings are some of class, mean, .*; got 'max'"),
        ({"last_blocks": [1, 5]}, "last_blocks is between 1 and the 4 of Vim; got 5"),
        ({"last_blocks": [0]}, "last_blocks is between 1 and the 4 of Vim; got 0"),
        ({"encoder": "test_vmamba", "encoder_args": {}, "poolings": ["class"]}, "VMamba has no class token to read"),
        ({"attentive": True, "attentive_heads": 5}, "attentive_heads divides the 32 channels of the last map; got 5"),
        ({"num_classes": 0}, "num_classes is at least 1"),
        ({"encoder": None}, "the encoder comes by its name or from a checkpoint"),
    ],
)
def test_arguments_that_make_no_probe_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        probe(**changes)


def test_images_without_a_label_are_refused_by_name(tmp_path: Path) -> None:
    data = Stripes()
    samples = data.samples
    data.samples = lambda split: [{**one, "label": -1} for one in samples(split)]  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="labels are from 0 to 3; got none of train0"):
        fit(probe(), tmp_path, data)


def test_one_image_a_batch_and_clipping_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs 2 images or more on each device; got data\.batch_size 1"):
        fit(probe(), tmp_path, Stripes(batch_size=1))
    with pytest.raises(ValueError, match=r"would couple the heads; got trainer\.gradient_clip_val 1"):
        fit(probe(), tmp_path, gradient_clip_val=1.0)


def test_a_copy_of_the_probe_gives_the_same_logits() -> None:
    model = probe().eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(copy.deepcopy(model)(images), model(images))
