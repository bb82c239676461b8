"""Reports of bad samples during a run."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from coco_folder import coco, write_coco
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from ssmpretrain.base.json_lines import read_rows
from ssmpretrain.base.run_folder import RunFolder
from ssmpretrain.callbacks import BadData, bad_data
from ssmpretrain.datamodules import CocoDetection, ImageShards, LargeScaleJitter
from ssmpretrain.run.metrics_logger import MetricsLogger


class Model(LightningModule):
    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.stop_at = stop_at

    def training_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
        if self.global_step == self.stop_at:
            raise KeyboardInterrupt
        return self.weight * batch["image"].mean()

    def validation_step(self, batch: dict[str, Any], index: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


BAD = {3: {"png": b"no"}, 20: {"cls": b"1"}, 41: {"png": b"no"}, 42: {"png": b"no"}}


@pytest.fixture
def folder(make_shards) -> Path:
    return make_shards([16, 32, 16], bad=BAD)


def fit(folder: Path, *, epochs: int = 2, data: Any = None, model: Any = None, **options: Any) -> Trainer:
    run = RunFolder(folder / "run")
    run.path.mkdir(exist_ok=True)
    shards = data or ImageShards(f"{folder}/train-*.tar", batch_size=4, num_workers=0, image_size=8)
    checkpoints = ModelCheckpoint(run.checkpoints, every_n_train_steps=3, filename="last", enable_version_counter=False)
    trainer = Trainer(
        accelerator="cpu", max_epochs=epochs, default_root_dir=run.path, logger=MetricsLogger(run),
        callbacks=[BadData(), checkpoints], enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model or Model(), shards, **options)
    return trainer


def listed(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "bad_samples.jsonl").read_text().splitlines()]


def test_each_epoch_says_what_was_skipped_and_lists_it(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    val = f"{folder}/train-000001.tar"
    with caplog.at_level(logging.WARNING):
        fit(folder, data=ImageShards(f"{folder}/train-*.tar", val=val, batch_size=4, num_workers=0, image_size=8))
    lines = [text for text in caplog.messages if text.startswith("epoch")]
    assert lines[1] == (
        "epoch 1: skipped 4 of 64 samples: 3 undecodable images in 2 files, most in train-000001.tar; "
        "1 samples without an image in train-000001.tar"
    )
    assert lines[0].startswith("epoch 1: validation: skipped 3 of 32 samples: 2 undecodable")
    assert len(lines) == 4
    rows = [row for row in read_rows(folder / "run" / "metrics.jsonl") if "data/bad_samples" in row]
    assert [row["data/bad_samples"] for row in rows] == [4, 4]
    assert [row["data/bad_samples/undecodable_images"] for row in rows] == [3, 3]
    assert any(row.get("data/bad_val_samples") == 3 for row in read_rows(folder / "run" / "metrics.jsonl"))
    entries = listed(folder)
    assert len(entries) == 2 * (4 + 3)
    assert sorted(entry["key"] for entry in entries if (entry["split"], entry["epoch"]) == ("train", 1)) == [
        "0003", "0020", "0041", "0042",
    ]  # fmt: skip
    assert set(entries[0]) == {"split", "epoch", "cause", "shard", "sample", "key", "detail"}


def test_an_epoch_without_a_bad_sample_logs_zero_and_says_nothing(
    make_shards, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_shards([16])
    fit(folder, epochs=1)
    assert [row["data/bad_samples"] for row in read_rows(folder / "run" / "metrics.jsonl")] == [0]
    assert "skipped" not in caplog.text
    assert not (folder / "run" / "bad_samples.jsonl").exists()


@pytest.mark.parametrize("killed", [False, True])
def test_a_run_that_is_interrupted_counts_and_lists_each_sample_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    if killed:
        monkeypatch.setattr(BadData, "on_exception", lambda *args: None)
    with pytest.raises(SystemExit):
        fit(folder, model=Model(stop_at=11))
    before = listed(folder)
    fit(folder, ckpt_path=folder / "run" / "checkpoints" / "last.ckpt")
    rows = [row for row in read_rows(folder / "run" / "metrics.jsonl") if "data/bad_samples" in row]
    assert [row["data/bad_samples"] for row in rows] == [4, 4]
    entries = listed(folder)
    assert before and entries[: len(before)] == before
    assert len({json.dumps(entry) for entry in entries}) == len(entries) == 8


def test_a_run_with_too_many_says_where_the_list_is(make_shards, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_shards([64], bad={number: {"png": b"no"} for number in range(1, 64, 3)})
    with pytest.raises(ValueError, match=r"more than 1.00% of the samples are unusable: 11 undecodable images"):
        fit(folder)
    assert f"{folder}/run/bad_samples.jsonl: lists the 11 bad samples so far." in caplog.text
    assert len(listed(folder)) == 11


def test_what_other_ranks_skipped_is_counted_and_judged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(mine: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        return [mine, [{**record, "shard": "of-rank-1.tar"} for record in mine]]

    def images(fraction: float) -> ImageShards:
        path = f"{folder}/train-*.tar"
        return ImageShards(path, batch_size=4, num_workers=0, image_size=8, max_bad_fraction=fraction)

    monkeypatch.setattr(bad_data, "gather", gather)
    trainer = fit(folder, epochs=1, data=images(0.008))
    assert trainer.logged_metrics["data/bad_samples"] == 8
    with pytest.raises(ValueError, match=r"8 of the 64 samples of the epoch were unusable, more than 0.70%"):
        fit(folder, epochs=1, data=images(0.007))


def test_a_data_module_that_says_nothing_is_let_alone(folder: Path) -> None:
    from lightning.pytorch import LightningDataModule
    from torch.utils.data import DataLoader

    class Other(LightningDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader([{"image": torch.zeros(3)}] * 8)

    assert "data/bad_samples" not in fit(folder, epochs=1, data=Other()).logged_metrics


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_run_that_bad_data_stopped_goes_on_when_they_are_repaired(make_shards, split: str) -> None:
    folder = make_shards([48])
    make_shards([48], "val")
    paths = {split: folder / f"{split}-000000.tar" for split in ("train", "val")}
    options: dict[str, Any] = {"ckpt_path": folder / "end-of-epoch.ckpt"}

    def images() -> ImageShards:
        return ImageShards(str(paths["train"]), val=str(paths["val"]), batch_size=4, num_workers=0, image_size=8)

    fit(folder, epochs=1, data=images())
    (folder / "run" / "checkpoints" / "last.ckpt").rename(options["ckpt_path"])
    whole = paths[split].read_bytes()
    paths[split].write_bytes(whole.replace(b"\x89PNG", b"junk", 30))
    with pytest.raises(ValueError, match=f"{split}: .*unusable: 11 damaged samples"):
        fit(folder, data=images(), **options)
    assert len(listed(folder)) >= 11
    paths[split].write_bytes(whole)
    trainer = fit(folder, data=images(), **options)
    assert trainer.current_epoch == 2 and trainer.logged_metrics["data/bad_samples"] == 0
    assert "data/bad_val_samples" not in trainer.logged_metrics


def test_a_run_goes_on_from_the_middle_of_an_epoch_that_has_too_many_already(folder: Path) -> None:
    def images(fraction: float = 0.01) -> ImageShards:
        path = f"{folder}/train-*.tar"
        return ImageShards(path, batch_size=4, num_workers=0, image_size=8, max_bad_fraction=fraction)

    with pytest.raises(SystemExit):
        fit(folder, model=Model(stop_at=15), data=images())
    last = folder / "run" / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=False)
    rows = [json.loads(line) for line in content["callbacks"]["BadData"]["trained"]]
    many = [json.dumps({**rows[0], "sample": 100 + number}) for number in range(20)]
    content["callbacks"]["BadData"]["trained"] = many
    torch.save(content, last)
    trainer = fit(folder, epochs=1, data=images(), ckpt_path=last)
    assert trainer.current_epoch == 1 and trainer.logged_metrics["data/bad_samples"] >= 20


def test_dropped_objects_are_listed_and_logged_and_are_no_bad_samples(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = coco()
    content["annotations"][0]["category_id"] = 6
    content["annotations"][1]["segmentation"] = [[1] * 6]
    paths = write_coco(tmp_path, content)
    small: dict[str, Any] = {"image_size": 16, "augmentation": LargeScaleJitter()}
    with caplog.at_level(logging.WARNING):
        trainer = fit(tmp_path, data=CocoDetection(*paths, batch_size=4, num_workers=0, **small))
    rows = listed(tmp_path)
    assert [(row["cause"], row["object"]) for row in rows] == [("unknown category", 0), ("mask without a pixel", 1)]
    assert sum("lists the 2 dropped objects" in text for text in caplog.messages) == 1  # the second epoch adds none
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged["data/bad_samples"] == 0 and logged["data/dropped_objects"] == 2
    assert logged["data/dropped_objects/unknown_category"] == 1
