"""Several views of each image from the data modules: plan, workers, resume, faults, copies, and a run."""

from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from PIL import Image
from torch import Tensor

from ssmpretrain.callbacks import SampleLog, Throughput
from ssmpretrain.datamodules import Digits, ImageFolder, ImageShards, ImageTextShards, Scenes, Shapes, ViewGroup
from ssmpretrain.datamodules.decoding import decode as decoding
from ssmpretrain.datamodules.decoding.photometric import Photometric
from ssmpretrain.datamodules.image_data import ImageData

COLOURS = Photometric(0.4, 0.4, 0.2, 0.1, grayscale_probability=0.2, blur_probability=0.5, solarize_probability=0.2)
VIEWS = [ViewGroup(2, None, (0.4, 1.0), photometric=COLOURS), ViewGroup(3, 4, (0.05, 0.4), True, None, COLOURS)]
SMALL: dict[str, Any] = {"batch_size": 4, "num_workers": 0, "image_size": 8, "views": VIEWS}


@pytest.fixture
def shards(make_shards) -> str:
    return f"{make_shards([11, 4, 7])}/train-*.tar"  # 22 samples: 5 batches of 4


def epoch(data: ImageData, number: int = 0, trained: int = 0) -> list[dict[str, Any]]:
    loader = data.train_dataloader()
    stage = {"world": 1, "batch_size": data.batch_size, "accumulate": 1, "steps": trained}
    loader.sampler.load_state_dict({"samples": 0, "epoch": number, "complete": False, "stages": [stage]})
    return list(loader)


def equal(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    return len(one) == len(other) and all(
        a["key"] == b["key"] and all(map(torch.equal, a["views"], b["views"])) for a, b in zip(one, other, strict=True)
    )


def by_key(batches: list[dict[str, Any]]) -> dict[str, list[bytes]]:
    """Return the views of each image as bytes; images that were read twice have the views of both."""
    found: dict[str, list[bytes]] = {}
    for batch in batches:
        for number, key in enumerate(batch["key"]):
            views = [view for of_size in batch["views"] for view in of_size[number]]
            found.setdefault(key, []).extend(view.numpy().tobytes() for view in views)
    return found


def folder_of_images(path: Path) -> str:
    path.mkdir()
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{number}.png")
    return str(path)


@pytest.mark.parametrize("kind", ["ImageFolder", "ImageShards", "ImageTextShards", "Digits", "Shapes", "Scenes"])
def test_every_image_data_module_gives_views_in_training_and_one_view_in_evaluation(
    kind: str, tmp_path: Path, write_shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSMPRETRAIN_CACHE", str(tmp_path / "cache"))
    views = [ViewGroup(2), ViewGroup(3, 16, (0.05, 0.4), local=True)]
    options: dict[str, Any] = {"views": views, "batch_size": 4, "num_workers": 0, "image_size": 32}
    drawn = {"train_images": 8, "val_images": 4}
    files = str(write_shard(tmp_path / "shards" / "train-000000.tar", captions=True)) if "Shards" in kind else ""
    data: ImageData = {
        "ImageFolder": lambda: ImageFolder(*[folder_of_images(tmp_path / "images")] * 2, **options),
        "ImageShards": lambda: ImageShards(files, files, **options),
        "ImageTextShards": lambda: ImageTextShards(files, files, **options),
        "Digits": lambda: Digits(**drawn, **options),
        "Shapes": lambda: Shapes(**drawn, **options),
        "Scenes": lambda: Scenes(**drawn, **options),
    }[kind]()
    assert data.views == views
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert "image" not in batch and batch["num_global"] == 2
    assert [tuple(of_size.shape) for of_size in batch["views"]] == [(4, 2, 3, 32, 32), (4, 3, 3, 16, 16)]
    assert len(batch["key"]) == len(batch["label"]) == 4
    if hasattr(data, "caption"):
        assert len(batch["text"]) == 4 and batch["owner"].tolist() == [0, 1, 2, 3]
    for loader in (data.val_dataloader(), data.bank_dataloader()):
        still = next(iter(loader))
        assert still["image"].shape == (4, 3, 32, 32) and "views" not in still


def test_an_image_is_decoded_once_for_all_its_views(shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    decode = decoding.decode_rgb
    monkeypatch.setattr(decoding, "decode_rgb", lambda encoded: decoded.append(1) or decode(encoded))
    epoch(ImageShards(shards, **SMALL))
    assert len(decoded) == 20


def test_workers_change_nothing_and_hand_the_views_over_in_shared_memory(shards: str) -> None:
    alone, together = epoch(ImageShards(shards, **SMALL)), epoch(ImageShards(shards, **{**SMALL, "num_workers": 2}))
    assert equal(alone, together)
    assert all(views.is_shared() for batch in together for views in batch["views"])


def test_views_do_not_depend_on_the_batch_and_differ_in_each_epoch(shards: str) -> None:
    fours, fives, later = (
        by_key(epoch(ImageShards(shards, **{**SMALL, "batch_size": size}), number))
        for size, number in ((4, 0), (5, 0), (4, 1))
    )
    assert len(fours) == 20 and all(fours[key] == fives[key] for key in fours.keys() & fives.keys())
    assert all(set(fours[key]).isdisjoint(later[key]) for key in fours.keys() & later.keys())


@pytest.mark.parametrize(("trained", "repeats"), [(1, 1), (4, 1), (2, 2)])
def test_resuming_gives_the_views_that_are_left(shards: str, trained: int, repeats: int) -> None:
    data = ImageShards(shards, **SMALL, repeats=repeats)
    whole, rest = epoch(data, 2), epoch(data, 2, trained)
    assert len(whole) == 5 and equal(rest, whole[trained:])


def test_copies_of_an_image_have_views_of_their_own_and_the_first_copy_those_without_repeats(shards: str) -> None:
    once, thrice = by_key(epoch(ImageShards(shards, **SMALL))), by_key(epoch(ImageShards(shards, **SMALL, repeats=2)))
    assert all(len(set(views)) == 10 for views in thrice.values()) and len(thrice) == 10
    assert all(set(once[key]) <= set(views) for key, views in thrice.items() if key in once)


def test_bad_samples_are_replaced_and_counted(make_shards) -> None:
    folder = make_shards([12], bad={number: {"png": b"no image", "cls": b"1"} for number in (1, 6)})
    data = ImageShards(f"{folder}/train-*.tar", **SMALL)
    batches = epoch(data)
    assert [[len(of_size) for of_size in batch["views"]] for batch in batches] == [[4, 4]] * 3
    assert Counter(key for batch in batches for key in batch["key"]).keys().isdisjoint({"0001", "0006"})
    assert data.bad_samples()["train"] == {"undecodable images": {f"{folder}/train-000000.tar": 2}}


class _Seen(L.LightningModule):
    """Objective that keeps the batches it sees, and logs a value for each."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
        self.seen: list[dict[str, Any]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.seen.append(batch)
        loss = torch.stack([self.layer(views.mean((1, 3, 4))).square().mean() for views in batch["views"]]).sum()
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("limit", [{"limit_train_batches": 3}, {"overfit_batches": 2}])
def test_a_trainer_moves_views_and_takes_the_number_of_images_as_the_size_of_a_batch(
    shards: str, tmp_path: Path, limit: dict[str, int]
) -> None:
    model, log, speed = _Seen(), SampleLog(), Throughput(every_n_steps=1)
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_epochs": 2}
    options |= {"enable_progress_bar": False, "enable_model_summary": False, "precision": "bf16-true", **limit}
    trainer = Trainer(default_root_dir=tmp_path, callbacks=[log, speed], **options)
    trainer.fit(model, datamodule=ImageShards(shards, **SMALL))
    count = next(iter(limit.values()))
    assert len(model.seen) == 2 * count
    assert equal(model.seen[:count], model.seen[count:]) is ("overfit_batches" in limit)
    assert extract_batch_size(model.seen[0]) == 4  # the weight of a batch in the mean of an epoch
    assert trainer.callback_metrics["train/images_per_second"] > 0
