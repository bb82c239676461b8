import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from ssmpretrain.datamodules import ImageShards
from ssmpretrain.datamodules.order.loader import EpochLoader
from ssmpretrain.datamodules.shards.pack import ShardWriter

SMALL: dict[str, Any] = {"batch_size": 4, "num_workers": 0, "image_size": 8, "shuffle_buffer": 10}


def shards(folder: Path, **options: Any) -> ImageShards:
    return ImageShards(f"{folder}/train-*.tar", **{**SMALL, **options})


def keys(loader: EpochLoader) -> list[list[str]]:
    return [batch["key"] for batch in loader]


def go_on(loader: EpochLoader, epoch: int, trained: int) -> None:
    """Continue in an epoch after a given number of batches of 4 samples."""
    stage = {"world": 1, "batch_size": 4, "accumulate": 1, "steps": trained}
    loader.sampler.load_state_dict({"samples": 0, "epoch": epoch, "complete": False, "stages": [stage]})


def flat(batches: list[list[str]]) -> list[str]:
    return [key for batch in batches for key in batch]


@pytest.fixture
def folder(make_shards) -> Path:
    return make_shards([11, 4, 20, 7])  # 42 samples: 10 batches of 4


def test_a_batch_has_the_promised_shapes_types_and_labels(folder: Path) -> None:
    data = shards(folder, image_size=(8, 6), val=f"{folder}/train-000001.tar")
    data.setup("fit")
    loader = data.train_dataloader()
    batch = next(iter(loader))
    assert (len(loader), data.samples_per_epoch("train")) == (10, 40)
    assert (batch["image"].shape, batch["image"].dtype) == ((4, 3, 8, 6), torch.float32)
    assert batch["label"].dtype == torch.int64
    assert batch["label"].tolist() == [int(key) % 10 for key in batch["key"]]
    assert flat(keys(data.val_dataloader())) == ["0011", "0012", "0013", "0014"]


def test_images_are_normalised_by_mean_and_std(folder: Path) -> None:
    mean, std = (0.2, 0.4, 0.6), (0.5, 0.25, 2.0)
    plain = next(iter(shards(folder, mean=(0, 0, 0), std=(1, 1, 1)).train_dataloader()))["image"]
    assert 0 <= plain.min() < plain.max() <= 1
    normalised = next(iter(shards(folder, mean=mean, std=std).train_dataloader()))["image"]
    expected = (plain - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(normalised, expected, atol=1e-5, rtol=1e-5)  # a few roundings of numbers up to 255


def test_an_epoch_reads_each_sample_once_and_the_next_one_in_another_order(folder: Path) -> None:
    loader = shards(folder).train_dataloader()
    first, second = flat(keys(loader)), flat(keys(loader))
    assert len(first) == len(set(first)) == len(set(second)) == 40
    assert first != second
    assert flat(keys(shards(folder).train_dataloader())) == first


@pytest.mark.parametrize("num_workers", [1, 3])
def test_persistent_workers_follow_the_epoch(folder: Path, num_workers: int) -> None:
    loader = shards(folder, num_workers=num_workers).train_dataloader()
    assert loader.persistent_workers
    epochs = [keys(loader) for _ in range(3)]
    assert [len(epoch) for epoch in epochs] == [10, 10, 10]
    assert len({tuple(flat(epoch)) for epoch in epochs}) == 3
    loader.sampler.set_epoch(1)
    assert keys(loader) == epochs[1]


def test_an_epoch_left_early_does_not_leak_into_the_next(folder: Path) -> None:
    loader = shards(folder, num_workers=2).train_dataloader()
    whole = [keys(loader) for _ in range(2)]
    loader.sampler.set_epoch(0)
    for _, batch in zip(range(3), loader, strict=False):
        assert batch["key"] in whole[0]
    assert keys(loader) == whole[1]


def test_a_sample_is_augmented_alike_by_any_number_of_workers_and_anew_each_epoch(folder: Path) -> None:
    def images(num_workers: int, epoch: int) -> dict[str, torch.Tensor]:
        loader = shards(folder, num_workers=num_workers).train_dataloader()
        loader.sampler.set_epoch(epoch)
        return {key: image for batch in loader for key, image in zip(batch["key"], batch["image"], strict=True)}

    alone, three, later = images(0, 0), images(3, 0), images(0, 1)
    assert set(alone) == set(three)
    assert all(torch.equal(alone[key], three[key]) for key in alone)
    both = set(alone) & set(later)
    assert sum(torch.equal(alone[key], later[key]) for key in both) < len(both) / 4


def test_loading_leaves_the_global_random_state_alone(folder: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(shards(folder).train_dataloader())
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_resuming_gives_the_batches_that_are_left(folder: Path, num_workers: int) -> None:
    loader = shards(folder, num_workers=num_workers).train_dataloader()
    loader.sampler.set_epoch(2)
    whole = [(batch["key"], batch["image"]) for batch in loader]
    for trained in (0, 1, 9) if num_workers == 0 else (4, 10):
        go_on(loader, 2, trained)
        rest = [(batch["key"], batch["image"]) for batch in loader]
        assert [key for key, _ in rest] == [key for key, _ in whole[trained:]]
        assert all(torch.equal(image, other) for (_, image), (_, other) in zip(rest, whole[trained:], strict=True))


def test_resuming_decodes_nothing_that_was_trained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ssmpretrain.datamodules.decoding import decode as decoding

    decoded = []
    decode = decoding.decode_rgb
    loader = shards(folder).train_dataloader()
    monkeypatch.setattr(decoding, "decode_rgb", lambda encoded: decoded.append(1) or decode(encoded))
    go_on(loader, 0, 7)
    assert len(list(loader)) == 3
    assert len(decoded) == 3 * 4


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_and_bank_keep_the_order(folder: Path, num_workers: int) -> None:
    data = shards(folder, val=f"{folder}/train-*.tar", num_workers=num_workers)
    everything = [f"{number:04d}" for number in range(42)]
    loader = data.val_dataloader()
    assert flat(keys(loader)) == flat(keys(loader)) == everything
    assert [len(batch) for batch in keys(loader)] == [4] * 10 + [2]
    assert flat(keys(data.bank_dataloader())) == everything
    some = flat(keys(data.bank_dataloader(limit=12)))
    assert len(some) == 12
    assert Counter(min(int(key) // 11, 1) for key in some)[1] > 6  # not the first shard's alone
    assert torch.equal(next(iter(data.bank_dataloader()))["image"], next(iter(data.bank_dataloader()))["image"])


def test_unlabelled_samples_have_label_minus_one_and_json_labels_are_read(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (9, 9)).save(tmp_path / "x.webp")
    image = (tmp_path / "x.webp").read_bytes()
    with ShardWriter(tmp_path, "train") as writer:
        writer.write("a", {"webp": image})
        writer.write("b", {"webp": image, "json": b'{"label": 7}'})
        writer.write("c", {"webp": image, "json": b'{"url": "x"}'})
        writer.write("d", {"webp": image, "cls": b"12\n"})
    data = ImageShards(str(tmp_path), batch_size=4, num_workers=0, image_size=8)
    assert [batch["label"].tolist() for batch in data.bank_dataloader()] == [[-1, 7, -1, 12]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_share_the_data_without_overlap_also_in_workers(
    folder: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[str]] = {"train": [], "val": []}
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        data = shards(folder, num_workers=num_workers, val=f"{folder}/train-*.tar")
        train, val = data.train_dataloader(), data.val_dataloader()
        assert (len(train), len(val)) == (3, 4)  # 42 samples: 3 x 3 batches of 4 and 6 left out; 3 x 4 batches
        assert (len(list(train)), len(list(val))) == (3, 4)
        train.sampler.set_epoch(0)
        for split, loader in (("train", train), ("val", val)):
            seen[split] += flat(keys(loader))
    assert len(seen["train"]) == len(set(seen["train"])) == 36
    assert sorted(seen["val"]) == [f"{number:04d}" for number in range(42)]


@pytest.mark.parametrize(
    ("world", "sizes", "batch_size", "num_workers"),
    [(1, [11, 4, 20, 7], 4, 0), (3, [11, 4, 20, 7], 4, 0), (4, [5], 4, 2), (2, [3, 2, 4], 16, 0), (3, [13], 1, 0)],
)
def test_every_rank_together_evaluates_each_sample_once_whatever_the_sizes(
    make_shards, monkeypatch: pytest.MonkeyPatch, world: int, sizes: list[int], batch_size: int, num_workers: int
) -> None:
    folder = make_shards(sizes)
    seen: dict[str, list[str]] = {"val": [], "bank": [], "part of the bank": []}
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        data = shards(folder, val=f"{folder}/train-*.tar", batch_size=batch_size, num_workers=num_workers, repeats=3)
        loaders = data.val_dataloader(), data.bank_dataloader(), data.bank_dataloader(limit=sum(sizes) - 1)
        for name, loader in zip(seen, loaders, strict=True):
            mine = keys(loader)
            assert len(mine) in ({len(loader)} if batch_size > 1 else {len(loader), len(loader) - 1})
            seen[name] += flat(mine)
    everything = [f"{number:04d}" for number in range(sum(sizes))]
    assert sorted(seen["val"]) == sorted(seen["bank"]) == everything
    assert len(seen["part of the bank"]) == len(set(seen["part of the bank"])) == sum(sizes) - 1


BROKEN: dict[int, dict[str, bytes]] = {
    3: {"png": b"no image", "cls": b"1"},
    15: {"cls": b"1"},
    16: {"png": b"", "cls": b"1"},
    30: {"png": b"no image", "cls": b"x"},
}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_samples_are_skipped_counted_and_replaced_in_training(make_shards, num_workers: int) -> None:
    folder = make_shards([11, 4, 20, 7], bad=BROKEN)
    data = shards(folder, val=f"{folder}/train-*.tar", num_workers=num_workers)
    data.use_labels()
    batches = keys(data.val_dataloader())
    assert [int(key) for key in flat(batches)] == [number for number in range(42) if number not in BROKEN]
    counts = data.bad_samples()["val"]
    assert {cause: sum(by_shard.values()) for cause, by_shard in counts.items()} == {
        "undecodable images": 2,
        "samples without an image": 1,
        "bad labels": 1,
    }
    assert counts["samples without an image"] == {f"{folder}/train-000002.tar": 1}
    assert [len(batch) for batch in keys(data.train_dataloader())] == [4] * 10
    assert data.bad_samples()["train"]


def test_the_first_bad_samples_are_reported_with_key_and_cause_and_then_few(
    make_shards, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_shards([100], bad={number: {"png": b"no", "cls": b"1"} for number in range(20, 29)})
    with caplog.at_level(logging.WARNING):
        list(shards(folder).bank_dataloader())
    assert len(caplog.messages) == 3
    assert "ImageShards: train: skipped 0020 in" in caplog.messages[0]
    assert "undecodable images (not a JPEG, PNG or WebP image but 2 bytes" in caplog.messages[0]


def test_too_many_bad_samples_stop_the_run_with_one_message_from_a_worker(make_shards) -> None:
    bad = {number: {"png": b"no image", "cls": b"1"} for number in range(1, 60, 3)}
    folder = make_shards([60], bad=bad)
    for num_workers in (0, 2):
        with pytest.raises(ValueError) as error:
            list(shards(folder, num_workers=num_workers).train_dataloader())
        text = str(error.value)
        start = r"ImageShards: train: more than 1\.00% of the samples are unusable: \d+ undecodable images in 1 file, "
        assert re.match(start, text)
        assert "Traceback" not in text and "\n" not in text
    assert list(shards(folder, max_bad_fraction=0.9).train_dataloader())


def test_a_shard_without_a_usable_sample_stops_the_run(make_shards) -> None:
    folder = make_shards([20, 3, 20], bad={number: {"png": b"no image"} for number in (20, 21, 22)})
    with pytest.raises(ValueError, match=r"no sample of .*train-000001.tar is usable: 3 undecodable images"):
        list(shards(folder).bank_dataloader())


def test_shards_without_usable_images_are_an_error_before_any_worker_starts(make_shards, tmp_path: Path) -> None:
    folder = make_shards([20], bad={number: {"png": b"no image"} for number in range(20)})
    with pytest.raises(
        ValueError, match=r"none of 16 samples tried can be used: 16 undecodable images in 1 file, .* 0000 in .*: undec"
    ):
        shards(folder).setup("fit")
    with ShardWriter(tmp_path / "text", "a") as writer:
        writer.write("0", {"txt": b"a cat"})
    with pytest.raises(ValueError, match=r"no image .* in 1 of 1 shards; .* holds \.txt"):
        ImageShards(str(tmp_path / "text")).setup("fit")


def test_where_no_sample_is_usable_every_cause_is_counted_the_most_frequent_first(make_shards) -> None:
    bad = {number: {"cls": b"1"} if number < 5 else {"png": b"<html>no"} for number in range(16)}
    folder = make_shards([14, 2], bad=bad)
    with pytest.raises(ValueError) as error:
        shards(folder).setup("fit")
    shard = f"{folder}/train-000000.tar"
    assert str(error.value).startswith(
        f"ImageShards: train: none of 16 samples tried can be used: 11 undecodable images in 2 files, most "
        f"in {shard}; 5 samples without an image in 1 file, {shard}; such as 0005 in {shard}: undecodable images ("
    )


def test_a_bad_sample_that_is_met_again_for_another_does_not_make_a_file_a_wrong_one(make_shards) -> None:
    folder = make_shards([2, 2, 2, 2, 8], bad={number: {"cls": b"1"} for number in (0, 2, 4, 6)})
    for seed in range(10):  # the bad one of two may be met twice before the good one
        assert len(list(shards(folder, shuffle_buffer=16, seed=seed).train_dataloader())) == 4


def test_a_batch_larger_than_the_data_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="one full batch; got batch_size 43 and 42 samples"):
        shards(folder, batch_size=43).setup("fit")


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("image_size", 0, "image_size is a positive"),
        ("image_size", (8, -1), "image_size is a positive"),
        ("batch_size", 0, "batch_size is at least 1; got 0"),
        ("num_workers", -1, "num_workers is from 0 to 1,024; got -1"),
        ("crop_scale", (0.9, 0.2), "crop_scale"),
        ("eval_crop_ratio", 1.2, "eval_crop_ratio"),
        ("std", (1.0, 0.0, 1.0), "std has three positive"),
        ("max_bad_fraction", 2.0, "max_bad_fraction"),
        ("shuffle_buffer", 0, "shuffle_buffer is from 1 to"),
    ],
)
def test_an_argument_out_of_range_is_named(argument: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"ImageShards: {message}"):
        ImageShards("a.tar", **{argument: value})


class Recorder(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[int, list[str]] = {}

    def training_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
        self.seen.setdefault(self.current_epoch, []).extend(batch["key"])
        return self.weight * batch["image"].mean()

    def validation_step(self, batch: dict[str, Any], index: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("with_val", [False, True])
def test_under_a_trainer_each_epoch_has_its_own_planned_order(folder: Path, tmp_path: Path, with_val: bool) -> None:
    data = shards(folder, num_workers=1, val=f"{folder}/train-000001.tar" if with_val else None)
    module = Recorder()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    Trainer(accelerator="cpu", max_epochs=3, default_root_dir=tmp_path, **quiet).fit(module, data)
    loader = shards(folder).train_dataloader()
    assert {epoch: len(set(seen)) for epoch, seen in module.seen.items()} == {0: 40, 1: 40, 2: 40}
    for epoch, seen in module.seen.items():
        loader.sampler.set_epoch(epoch)
        assert seen == flat(keys(loader))
