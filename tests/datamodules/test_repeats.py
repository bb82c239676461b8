"""Repeated augmentation: the plan, and the batches that follow it."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ssmpretrain.datamodules import ImageFolder, ImageShards
from ssmpretrain.datamodules.image_data import ImageData
from ssmpretrain.datamodules.order.batches import apart
from ssmpretrain.datamodules.order.plan import Order, Stage, TrainPlan

SMALL: dict[str, Any] = {"batch_size": 6, "num_workers": 0, "image_size": 8}
SIZES = [7, 1, 0, 30, 12, 5, 64, 3]  # 122


@pytest.fixture
def folder(make_shards) -> Path:
    return make_shards([11, 4, 20, 7])  # 42 samples: 7 batches of 6


@pytest.fixture(params=["shards", "folder"])
def data(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> Any:
    if request.param == "shards":
        return lambda **options: ImageShards(f"{folder}/train-*.tar", shuffle_buffer=10, **{**SMALL, **options})
    (tmp_path / "files").mkdir()
    for number in range(42):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "files" / f"{number:04d}.png")
    return lambda **options: ImageFolder(str(tmp_path / "files"), **{**SMALL, **options})


def epoch(data: ImageData, number: int = 0, trained: int = 0) -> list[dict[str, Any]]:
    loader = data.train_dataloader()
    stage = {"world": 1, "batch_size": data.batch_size, "accumulate": 1, "steps": trained}
    loader.sampler.load_state_dict({"samples": 0, "epoch": number, "complete": False, "stages": [stage]})
    return list(loader)


def counts(batches: list[dict[str, Any]]) -> Counter[str]:
    return Counter(key for batch in batches for key in batch["key"])


def test_each_image_of_an_epoch_appears_as_often_as_asked_each_time_another(data: Any) -> None:
    batches = epoch(data(repeats=3))
    assert [len(batch["key"]) for batch in batches] == [6] * 7
    assert set(counts(batches).values()) == {3} and len(counts(batches)) == 14
    for batch in batches:
        assert len({image.numpy().tobytes() for image in batch["image"]}) == 6


@pytest.mark.parametrize("num_workers", [0, 2])
def test_as_many_epochs_as_repeats_read_every_image_and_then_in_another_order(data: Any, num_workers: int) -> None:
    images = data(repeats=3, num_workers=num_workers)
    epochs = [counts(epoch(images, number)) for number in range(6)]
    assert sum(epochs[:3], Counter()) == sum(epochs[3:], Counter())
    assert len(sum(epochs[:3], Counter())) == 42
    assert set(epochs[0]) != set(epochs[3])


def test_the_first_copy_is_the_one_that_a_run_without_repeats_sees(data: Any) -> None:
    def seen(repeats: int) -> dict[str, set[bytes]]:
        found: dict[str, set[bytes]] = {}
        for batch in epoch(data(repeats=repeats)):
            for key, image in zip(batch["key"], batch["image"], strict=True):
                found.setdefault(key, set()).add(image.numpy().tobytes())
        return found

    once, thrice = seen(1), seen(3)
    assert all(once[key] <= copies for key, copies in thrice.items())


def test_an_image_is_read_and_decoded_once_for_all_its_copies(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ssmpretrain.datamodules.decoding import decode as decoding

    decoded = []
    decode = decoding.decode_rgb
    monkeypatch.setattr(decoding, "decode_rgb", lambda encoded: decoded.append(1) or decode(encoded))
    epoch(data(repeats=3))
    assert len(decoded) == 14  # and 42 without


@pytest.mark.parametrize("batch_size", [4, 5, 7])
def test_a_batch_that_repeats_does_not_divide_gives_its_last_image_what_is_left(data: Any, batch_size: int) -> None:
    for batch in epoch(data(repeats=3, batch_size=batch_size)):
        images, left = divmod(batch_size, 3)
        assert sorted(Counter(batch["key"]).values(), reverse=True) == [3] * images + [left] * (left > 0)


def test_more_repeats_than_a_batch_holds_fill_each_batch_with_one_image(data: Any) -> None:
    batches = epoch(data(repeats=9, batch_size=4))
    assert [set(Counter(batch["key"]).values()) for batch in batches] == [{4}] * 10


@pytest.mark.parametrize(("batch_size", "repeats"), [(6, 3), (7, 3), (7, 4), (10, 3), (12, 2)])
def test_mixup_never_pairs_two_copies_of_an_image(data: Any, batch_size: int, repeats: int) -> None:
    for batch in epoch(data(repeats=repeats, batch_size=batch_size)):
        keys = batch["key"]
        assert all(keys[number] != keys[-1 - number] for number in range(batch_size // 2))
        copies = Counter(zip(keys, (image.numpy().tobytes() for image in batch["image"]), strict=True))
        assert set(copies.values()) == {1}


def test_apart_is_a_permutation_that_keeps_the_first_half() -> None:
    for length in range(12):
        batch = apart(list(range(length)))  # type: ignore[arg-type]
        assert sorted(batch) == list(range(length))  # type: ignore[type-var]
        assert batch[: length // 2] == list(range(length // 2))


@pytest.mark.parametrize(("num_workers", "trained"), [(0, 0), (0, 1), (0, 7), (1, 4), (3, 1), (3, 4)])
def test_resuming_gives_the_batches_that_are_left(data: Any, num_workers: int, trained: int) -> None:
    images = data(repeats=3, num_workers=num_workers, batch_size=5, random_erasing=0.5)
    whole, rest = epoch(images, 2), epoch(images, 2, trained)
    assert len(whole) == 8 and len(rest) == 8 - trained
    for left, batch in zip(rest, whole[trained:], strict=True):
        assert left["key"] == batch["key"]
        assert torch.equal(left["image"], batch["image"])


def test_bad_samples_leave_full_batches_and_are_counted_once(make_shards) -> None:
    folder = make_shards([12], bad={number: {"png": b"no image", "cls": b"1"} for number in (1, 6)})
    images = ImageShards(f"{folder}/train-*.tar", repeats=2, **SMALL)
    for number in range(2):
        assert [len(batch["key"]) for batch in epoch(images, number)] == [6, 6]
    assert images.bad_samples()["train"] == {"undecodable images": {f"{folder}/train-000000.tar": 2}}


def test_an_epoch_counts_each_image_that_it_reads_once(folder: Path) -> None:
    images = ImageShards(f"{folder}/train-*.tar", repeats=3, **{**SMALL, "batch_size": 5})
    assert images.samples_per_epoch("train") == 8 * 2  # two images a batch


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(("batch_size", "repeats"), [(4, 3), (6, 3), (4, 2), (5, 7)])
def test_ranks_read_different_images_in_equally_many_batches(world: int, batch_size: int, repeats: int) -> None:
    stage = Stage(world, batch_size)
    for number in range(2 * repeats):
        plan = TrainPlan(SIZES, Order(1, 16, repeats), number, [stage])
        seen = []
        for rank in range(world):
            samples = plan.samples(rank, 0, plan.num_batches)
            assert len(samples.shards) == plan.num_batches * -(-batch_size // repeats)
            seen += list(zip(samples.shards.tolist(), samples.samples.tolist(), strict=True))
        assert len(seen) == len(set(seen))
        assert all(0 <= sample < SIZES[shard] for shard, sample in seen)
