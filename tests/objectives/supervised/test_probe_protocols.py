"""Published protocols of linear probes, against loops written by hand: DINO, DINOv2, LeJEPA, Dino-Mamba."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from ssmpretrain.objectives import LinearProbe
from ssmpretrain.training.optim import SGD, AdamW, Cosine, HeadAdamW

EPOCHS, BATCH = 3, 16


class Noise(LightningDataModule):
    """Images of noise with four labels; three steps of 16 images an epoch, in one order."""

    image_size, mean, std, train = 64, (0.5,) * 3, (0.25,) * 3, "noise"

    def __init__(self, batch_size: int = BATCH) -> None:
        super().__init__()
        self.batch_size = batch_size

    def samples(self) -> list[dict[str, Any]]:
        generator = torch.Generator().manual_seed(0)
        return [
            {"image": torch.randn(3, 64, 64, generator=generator), "label": number % 4, "key": str(number)}
            for number in range(48)
        ]

    def num_samples(self, split: str) -> int:
        return 48

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.samples(), self.batch_size)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.samples(), 48)  # type: ignore[arg-type]


def probe(encoder: str = "test_vim", **changes: Any) -> LinearProbe:
    torch.manual_seed(0)
    settings = {"encoder": encoder, "encoder_args": {"img_size": 64}, "num_classes": 4}
    return LinearProbe(**settings | changes)  # type: ignore[arg-type]


def fit(model: LinearProbe, folder: Path) -> dict[str, Any]:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary"), False)
    chosen = Trainer(accelerator="cpu", max_epochs=EPOCHS, num_sanity_val_steps=0, default_root_dir=folder, **quiet)
    chosen.fit(model, datamodule=Noise())
    table: dict[str, Any] = json.loads((folder / "probe.json").read_text())
    return table


def class_and_patches(model: LinearProbe, images: Tensor, mixer: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Class token and patches of every block of a Vim after the final norm, by hand."""
    encoder: Any = model.encoder
    with torch.no_grad():
        stream, (h, w) = encoder.embed_all(images)
        middle, found = h * w // 2, []
        for block in encoder.layers:
            mixed = block.mixer(block.norm(stream))
            stream = stream + mixed
            tokens = encoder.norm_f(mixed if mixer else stream)
            found.append((tokens[:, middle], torch.cat([tokens[:, :middle], tokens[:, middle + 1 :]], dim=1)))
    return found


def trained_by_hand(
    features: Tensor, labels: Tensor, head: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, by_epoch: bool
) -> nn.Module:
    for _ in range(EPOCHS):
        for x, y in zip(features.split(BATCH), labels.split(BATCH), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(head(x), y).backward()
            optimizer.step()
            if not by_epoch:
                scheduler.step()
        if by_epoch:
            scheduler.step()
    return head


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    pairs = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    return all(torch.allclose(one, other, rtol=1e-4, atol=1e-6) for one, other in pairs)


@pytest.mark.parametrize(
    ("read", "blocks", "pooling", "weight_decay"),
    [
        ("stream", 4, "class", 0.0),
        ("stream", 1, "both", 0.0),
        ("mixer", 3, "class", 0.01),
        ("stream", 2, "class_mean", 0.0),
    ],
    ids=["DINO, small", "DINO, base", "Dino-Mamba", "DINOv2"],
)
def test_probe_of_dino_is_sgd_without_a_norm_on_class_tokens(
    read: str, blocks: int, pooling: str, weight_decay: float, tmp_path: Path
) -> None:
    by_epoch = pooling != "class_mean"
    model = probe(
        poolings=[pooling], last_blocks=[blocks], learning_rates=[5.0], read=read, normalisation="none",
        optimizer=SGD(weight_decay=weight_decay), schedule=Cosine(warmup_epochs=0, by_epoch=by_epoch),
    )  # fmt: skip
    (kind,) = model.sweeps
    (ours,) = model.sweeps[kind].heads
    head = nn.Linear(ours.weight.shape[1], 4)
    head.load_state_dict(ours.state_dict())
    batch = default_collate(Noise().samples())
    found = class_and_patches(model, batch["image"], read == "mixer")[-blocks:]
    parts = [token for token, _ in found] + ([found[-1][1].mean(1)] if pooling in ("both", "class_mean") else [])
    optimizer = torch.optim.SGD(head.parameters(), 5.0 * BATCH / 256, momentum=0.9, weight_decay=weight_decay)
    length = EPOCHS if by_epoch else EPOCHS * 48 // BATCH
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, length, eta_min=0)
    before = head.weight.detach().clone()
    table = fit(model, tmp_path)
    trained_by_hand(torch.cat(parts, dim=1), batch["label"], head, optimizer, scheduler, by_epoch)
    assert same(ours, head) and not torch.allclose(head.weight, before, atol=1e-2)
    protocol = table["protocol"]
    assert (protocol["read"], protocol["normalisation"]) == (read, "none")
    assert protocol["optimizer"] == {"kind": "SGD", "weight_decay": weight_decay, "momentum": 0.9}
    assert protocol["chosen_on"] == "nothing, there is one head"


def test_probe_of_lejepa_is_adamw_with_a_layer_norm_on_the_class_tokens_of_two_blocks(tmp_path: Path) -> None:
    model = probe(
        poolings=["class"], last_blocks=[2], learning_rates=[0.1, 0.3], normalisation="layer",
        optimizer=HeadAdamW(weight_decay=0.1), schedule=Cosine(warmup_epochs=0),
    )  # fmt: skip
    ours = model.sweeps["class_2"].heads
    batch = default_collate(Noise().samples())
    features = torch.cat([token for token, _ in class_and_patches(model, batch["image"])[-2:]], dim=1)
    heads = []
    for head, rate in zip(ours, (0.1, 0.3), strict=True):
        theirs = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 4))
        theirs.load_state_dict(head.state_dict())
        optimizer = torch.optim.AdamW(theirs.parameters(), rate * BATCH / 256, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * 3, eta_min=0)
        heads.append(trained_by_hand(features, batch["label"], theirs, optimizer, scheduler, by_epoch=False))
    table = fit(model, tmp_path)
    assert all(same(*pair) for pair in zip(ours, heads, strict=True))
    assert table["protocol"]["normalisation"].startswith("LayerNorm with weights")
    assert table["protocol"]["optimizer"]["kind"] == "HeadAdamW" and table["best"]["optimizer"] == "AdamW"


def test_the_sentence_at_the_end_says_the_protocol(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(
        probe(poolings=["class"], last_blocks=[3], learning_rates=[0.001], read="mixer", normalisation="none",
              optimizer=SGD(weight_decay=0.01)),
        tmp_path,
    )  # fmt: skip
    said = capsys.readouterr().out
    assert (
        "with class pooling of the last 3 blocks (outputs of their mixers), no norm and SGD at lr_per_256 0.001" in said
    )
    assert (
        " at lr_per_256 0.001, weight decay 0.01 (peak lr 6.25e-05 at batch 16) for 3 epochs" in said
        and "; the only head" in said
    )


def test_attentive_heads_keep_their_norm_and_adamw_beside_other_heads() -> None:
    model = probe(normalisation="none", attentive=True, attentive_heads=4, optimizer=SGD(weight_decay=0.5))
    assert {head["kind"]: (head["normalisation"], head["optimizer"]) for head in model.heads} == {
        **dict.fromkeys(("mean_1", "class_1", "both_1"), ("none", "SGD")), "attentive_1": ("batch", "AdamW"),
    }  # fmt: skip
    groups = model.build_optimizer(256).param_groups
    assert {(group["steps_with"], group["weight_decay"]) for group in groups} == {("sgd", 0.5), ("adamw", 0.0)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalisation": "group"}, "normalisation is one of batch, layer, none; got 'group'. MAE's is batch"),
        ({"read": "mixers"}, "read is stream or mixer of Vim; got 'mixers'"),
        ({"encoder": "test_vit", "read": "mixer"}, "read is stream of VisionTransformer; got 'mixer'"),
        ({"optimizer": AdamW()}, "optimizer is LARS, SGD or HeadAdamW, because each head has a rate of its own"),
    ],
)
def test_options_that_make_no_probe_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        probe(**changes)


def test_a_checkpoint_of_an_older_version_is_that_of_batch_normalised_streams(tmp_path: Path) -> None:
    model = probe(poolings=["mean"])
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    chosen = Trainer(accelerator="cpu", max_epochs=1, limit_val_batches=0, default_root_dir=tmp_path, **quiet)
    chosen.fit(model, datamodule=Noise())
    chosen.save_checkpoint(tmp_path / "x.ckpt")
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    for name in ("read", "normalisation"):
        del content["hyper_parameters"][name]
    del content["hyper_parameters"]["optimizer"]["kind"]
    torch.save(content, tmp_path / "old.ckpt")
    same_model, other = probe(poolings=["mean"]), probe(poolings=["mean"], normalisation="none")
    again = Trainer(accelerator="cpu", max_epochs=2, default_root_dir=tmp_path, enable_model_summary=False, **quiet)
    again.fit(same_model, datamodule=Noise(), ckpt_path=str(tmp_path / "old.ckpt"), weights_only=True)
    with pytest.raises(ValueError, match=r"made with normalisation batch; got none. Set model.normalisation"):
        again.validate(other, Noise(), str(tmp_path / "old.ckpt"), weights_only=True)
