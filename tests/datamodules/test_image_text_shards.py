"""Images with captions: pairs, their order, and counts of bad samples."""

import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.io import encode_png

from ssmpretrain.datamodules import ImageTextShards
from ssmpretrain.datamodules.decoding.captioned import CaptionBatcher
from ssmpretrain.datamodules.order.plan import Stage
from ssmpretrain.datamodules.shards.pack import ShardWriter

SMALL: dict[str, Any] = {"batch_size": 4, "num_workers": 0, "image_size": 8, "shuffle_buffer": 10}
WHOLE: dict[str, Any] = {"crop_scale": (1.0, 1.0), "image_size": 12, "mean": (0, 0, 0), "std": (1, 1, 1)}  # as drawn


def picture(number: int) -> Tensor:
    """Return a small picture that differs for each number."""
    return torch.randint(0, 256, (3, 12, 12), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)


def sample(number: int, captions: int = 3) -> dict[str, bytes]:
    """Return captions that name the number: one in txt, several in json."""
    texts = [f"{number:04d} in words {caption}" for caption in range(captions)]
    return {
        "png": encode_png(picture(number)).numpy().tobytes(),
        "cls": str(number % 10).encode(),
        "txt": f"{number:04d} 猫 🐈".encode(),
        "json": json.dumps({"captions": texts}).encode(),
    }


def write(folder: Path, count: int, bad: dict[int, dict[str, bytes]] | None = None, per_shard: int = 16) -> str:
    with ShardWriter(folder, "train", samples_per_shard=per_shard) as writer:
        for number in range(count):
            writer.write(f"{number:04d}", (bad or {}).get(number, sample(number)))
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("pairs"), 42)  # 10 batches of 4


def shards(folder: str, **options: Any) -> ImageTextShards:
    return ImageTextShards(folder, **{**SMALL, **options})


def without(number: int, field: str, **other: bytes) -> dict[str, bytes]:
    return {**{name: content for name, content in sample(number).items() if name != field}, **other}


def pairs(batches: Any) -> list[tuple[str, str]]:
    """(key, caption) of each caption."""
    return [
        (batch["key"][image], text)
        for batch in batches
        for image, text in zip(batch["owner"].tolist(), batch["text"], strict=True)
    ]


def is_of(image: Tensor, key: str) -> bool:
    return torch.allclose(image, picture(int(key)) / 255, atol=1e-5)  # a few roundings


# The batch.


def test_a_training_batch_has_one_caption_of_each_image(folder: str) -> None:
    batch = next(iter(shards(folder).train_dataloader()))
    assert set(batch) == {"image", "label", "key", "text", "owner"}
    assert (batch["image"].shape, batch["image"].dtype) == ((4, 3, 8, 8), torch.float32)
    assert batch["label"].tolist() == [int(key) % 10 for key in batch["key"]]
    assert batch["text"] == [f"{key} 猫 🐈" for key in batch["key"]]
    assert batch["owner"].tolist() == [0, 1, 2, 3] and batch["owner"].dtype == torch.int64


def test_evaluation_has_all_captions_of_each_image_in_order(tmp_path: Path) -> None:
    folder = write(tmp_path, 6, bad={number: sample(number, captions=number + 1) for number in range(6)})
    data = shards(folder, val=folder, caption=["txt", "json.captions"])
    for loader in (data.val_dataloader(), data.bank_dataloader()):
        first, second = loader
        assert first["key"] == ["0000", "0001", "0002", "0003"] and second["key"] == ["0004", "0005"]
        assert first["owner"].tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3]
        assert first["text"][2:5] == ["0001 猫 🐈", "0001 in words 0", "0001 in words 1"]
        assert len(second["text"]) == 6 + 7
        assert all(text.startswith(key) for key, text in pairs([first, second]))


def test_samples_without_a_label_are_welcome(tmp_path: Path) -> None:
    data = shards(write(tmp_path, 8, bad={number: without(number, "cls") for number in range(8)}))
    assert next(iter(data.train_dataloader()))["label"].tolist() == [-1] * 4


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_tokenizer_runs_where_batches_are_made(folder: str, num_workers: int) -> None:
    def tokenizer(texts: list[str]) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor([len(text) for text in texts])
        return torch.stack([lengths, torch.full_like(lengths, os.getpid())], dim=1), lengths > 7

    data = shards(folder, val=folder, num_workers=num_workers, caption=["txt", "json.captions"])
    data.setup("fit")
    data.tokenizer = tokenizer  # as `configure_model` does: after `setup`, before any loader
    for loader in (data.train_dataloader(), data.val_dataloader()):
        batch = next(iter(loader))
        assert batch["tokens"][:, 0].tolist() == [len(text) for text in batch["text"]]
        assert batch["cut"].tolist() == [len(text) > 7 for text in batch["text"]]
        assert (batch["tokens"][0, 1].item() == os.getpid()) == (num_workers == 0)


def test_by_default_an_image_is_not_mirrored_and_nearly_whole(folder: str) -> None:
    data = shards(folder)
    assert (data.crop_scale, data.horizontal_flip, data.eval_crop_ratio) == ((0.9, 1.0), False, 1.0)


# Which caption, and whose.


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("repeats", [1, 2])
def test_every_caption_lies_beside_its_image_also_where_others_stand_in(
    tmp_path: Path, num_workers: int, repeats: int
) -> None:
    bad = {number: without(number, "json") for number in (0, 5, 6, 7, 11)}
    bad |= {number: {**sample(number), "png": b"no image"} for number in (12, 13)}
    folder = write(tmp_path, 24, bad)
    options: dict[str, Any] = {**WHOLE, "repeats": repeats, "num_workers": num_workers}
    data = shards(folder, caption="json.captions", **options)
    batches = list(data.train_dataloader())
    assert [len(batch["text"]) for batch in batches] == [4] * 6
    for batch in batches:
        assert all(text.startswith(key) for key, text in zip(batch["key"], batch["text"], strict=True))
        assert all(is_of(image, key) for key, image in zip(batch["key"], batch["image"], strict=True))
    met = Counter(key for batch in batches for key in batch["key"])
    assert max(met.values()) > repeats  # some stood in


def stepped(folder: str, accumulate: int, **options: Any) -> list[Any]:
    """The batches of an epoch, `accumulate` of which make an optimizer step."""
    data = shards(folder, **{"shuffle_buffer": 1, **options})
    loader = data.train_dataloader()
    stage = {"world": 1, "batch_size": data.batch_size, "accumulate": accumulate, "steps": 0}
    loader.sampler._stage = Stage(1, data.batch_size, accumulate)
    loader.sampler.load_state_dict({"samples": 0, "epoch": 0, "complete": False, "stages": [stage]})
    return list(loader)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_no_pair_meets_itself_in_a_step_where_others_stand_in(tmp_path: Path, num_workers: int) -> None:
    bad = {number: without(number, "txt") for number in (1, 2, 5, 6, 12, 13, 21, 38, 39)}
    folder = write(tmp_path, 40, bad, per_shard=40)  # 5 steps of 2 batches of 4, in order
    alone = stepped(folder, 2)
    batches = stepped(folder, 2, num_workers=num_workers)
    assert [batch["key"] for batch in batches] == [batch["key"] for batch in alone]
    steps = [batches[number]["key"] + batches[number + 1]["key"] for number in range(0, 10, 2)]
    assert [len(set(step)) for step in steps] == [8] * 5
    # From the same place of the next step, or of the one before the last.
    assert [batch["key"][-2:] for batch in batches[:2]] == [["0008", "0009"], ["0014", "0015"]]
    assert batches[9]["key"][-2:] == ["0028", "0029"]
    assert all(text.startswith(key) for key, text in pairs(batches))


def test_no_more_is_decoded_than_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    decode = CaptionBatcher.decode
    monkeypatch.setattr(
        CaptionBatcher, "decode", lambda self, raw, *more: decoded.append(raw["__key__"]) or decode(self, raw, *more)
    )
    folder = write(tmp_path, 24, {1: without(1, "txt"), 8: without(8, "txt")}, per_shard=24)
    stepped(folder, 2)
    assert Counter(decoded) == Counter(f"{number:04d}" for number in [*range(24), 8, 9, 16])


def test_only_where_nothing_else_is_usable_a_step_meets_a_pair_again(tmp_path: Path) -> None:
    one_step = write(tmp_path / "one", 8, {1: without(1, "txt")}, per_shard=8)
    assert stepped(one_step, 2)[0]["key"] == ["0000", "0002", "0003", "0004"]
    one_batch = write(tmp_path / "batch", 4, {1: without(1, "txt")})
    assert stepped(one_batch, 1)[0]["key"] == ["0000", "0002", "0003", "0000"]
    bad = {number: without(number, "txt") for number in (1, 2, 3, *range(8, 16)) if number != 13}
    few = write(tmp_path / "few", 16, bad, per_shard=16)
    first = stepped(few, 2, max_bad_fraction=1.0)[0]
    assert first["key"] == ["0000", "0013", "0004", "0005"]


def test_a_stand_in_comes_with_its_copies(tmp_path: Path) -> None:
    folder = write(tmp_path, 12, {1: without(1, "txt")}, per_shard=12)
    batches = stepped(folder, 1, batch_size=6, repeats=3, crop_scale=(0.2, 1.0))
    assert sorted(Counter(batches[0]["key"]).values()) == [3, 3]
    assert [len({image.numpy().tobytes() for image in batch["image"]}) for batch in batches] == [6, 6]


def test_samples_that_an_epoch_reads_twice_do_not_stand_in_for_themselves(tmp_path: Path) -> None:
    folder = write(tmp_path, 10, {number: without(number, "txt") for number in (1, 2, 3)}, per_shard=10)
    for seed in range(3):
        batches = stepped(folder, 1, epoch_samples=40, shuffle_buffer=10, seed=seed, max_bad_fraction=1.0)
        of_one_pass = [batch["key"] for number, batch in enumerate(batches) if number % 5 != 2]
        assert [len(set(keys)) for keys in of_one_pass] == [4] * 8


def test_all_captions_of_an_image_have_their_turn(folder: str) -> None:
    loader = shards(folder, caption="json.captions").train_dataloader()
    seen = Counter(text for _ in range(20) for _, text in pairs(loader))
    assert len(seen) == 42 * 3
    drawn = [sum(count for text, count in seen.items() if text.endswith(f" {number}")) for number in range(3)]
    assert sum(drawn) == 800 and min(drawn) > 800 / 3 - 5 * 13.4  # five standard deviations of a fair draw


def test_copies_of_an_image_draw_their_captions_each_for_itself(folder: str) -> None:
    batches = list(shards(folder, caption="json.captions", repeats=4).train_dataloader())
    assert any(len(set(batch["text"])) > 1 for batch in batches)


@pytest.mark.parametrize("epoch", [0, 3])
def test_a_caption_depends_on_seed_epoch_and_sample_alone(folder: str, epoch: int) -> None:
    def drawn(**options: Any) -> dict[str, str]:
        loader = shards(folder, caption="json.captions", **options).train_dataloader()
        loader.sampler.set_epoch(epoch)
        return dict(pairs(loader))

    alone, others, seed = drawn(), drawn(num_workers=2, batch_size=3, shuffle_buffer=7), drawn(seed=1)
    both = alone.keys() & others.keys()
    assert len(both) >= 38 and all(alone[key] == others[key] for key in both)
    assert any(alone[key] != seed[key] for key in alone.keys() & seed.keys())


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0)])
def test_a_resumed_run_goes_on_with_the_captions_it_would_have_seen(folder: str, before: int, after: int) -> None:
    def data(num_workers: int) -> ImageTextShards:
        return shards(folder, caption=["json.captions", "txt"], num_workers=num_workers)

    whole = list(data(0).train_dataloader())
    stopped, resumed = data(before), data(after)
    loader = iter(stopped.train_dataloader())
    assert [next(loader)["text"] for _ in range(6)] == [batch["text"] for batch in whole[:6]]
    resumed.load_state_dict(stopped.state_dict())
    assert [batch["text"] for batch in resumed.train_dataloader()] == [batch["text"] for batch in whole[6:]]


# What cannot be used.

BAD = {
    2: {**sample(2), "txt": b" \n"},
    3: without(3, "txt"),
    5: {**sample(5), "txt": "café".encode("latin-1")},
    8: {**sample(8), "txt": "a cat".encode("utf-16")},
    9: without(9, "png"),
    11: {**sample(11), "json": b"[" * 100_000, "cls": b"1"},  # not read: the label is in cls
    12: {**without(12, "cls"), "json": b"[" * 100_000},
}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_samples_without_a_usable_caption_are_counted_by_cause(tmp_path: Path, num_workers: int) -> None:
    data = shards(write(tmp_path, 24, BAD, per_shard=24), num_workers=num_workers)
    data.use_labels()
    evaluated = [key for key, _ in pairs(data.bank_dataloader())]
    assert evaluated == [f"{number:04d}" for number in range(24) if number not in {2, 3, 5, 8, 9, 12}]
    assert len(list(data.train_dataloader())) == 6
    shard = str(tmp_path / "train-000000.tar")
    for use in ("bank", "train"):
        assert data.bad_samples()[use] == {
            "empty captions": {shard: 1},
            "samples without a caption": {shard: 1},
            "captions that are not UTF-8": {shard: 2},
            "samples without an image": {shard: 1},
            "bad labels": {shard: 1},
        }
    details = {record["key"]: record["detail"] for record in data.bad_records()}
    assert details["0005"] == "txt: byte 3 is 0xe9"
    assert details["0003"] == "no txt; fields: cls, json, png"


def test_a_sample_with_one_usable_caption_of_several_is_a_good_one(tmp_path: Path) -> None:
    data = shards(write(tmp_path, 24, BAD, per_shard=24), caption=["txt", "json.captions"])
    assert {key for key, _ in pairs(data.bank_dataloader())} == {f"{n:04d}" for n in range(24) if n != 9}
    assert data.bad_samples()["bank"].keys() == {"samples without an image"}  # nobody uses the label of 12


def test_a_long_caption_is_whole(tmp_path: Path) -> None:
    text = "long 🐈 " * 1500 + "end"
    data = shards(write(tmp_path, 4, {1: {**sample(1), "txt": text.encode()}}))
    assert dict(pairs(data.train_dataloader()))["0001"] == text
    assert len(text) > 10_000 and not data.bad_samples()["train"]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("field", "cause"),
    [(b"", "empty captions"), (b"\xff\xfea\0", "captions that are not UTF-8"), (None, "samples without a caption")],
)
def test_data_without_a_usable_sample_are_an_error_in_setup(
    tmp_path: Path, num_workers: int, field: bytes | None, cause: str
) -> None:
    bad = {n: without(n, "txt") if field is None else {**sample(n), "txt": field} for n in range(300)}
    # The index of the shard knows that it has a txt, but for one sample only.
    folder = write(tmp_path, 300, {**bad, 299: {"txt": b"no image"}}, per_shard=300)
    started = time.monotonic()
    with pytest.raises(ValueError, match=rf"^ImageTextShards: train: none of 16 samples tried .* {cause} ") as caught:
        shards(folder, num_workers=num_workers, max_bad_fraction=1.0).setup("fit")
    assert "train-000000.tar" in str(caught.value)
    assert time.monotonic() - started < 30  # it is no hang


def test_data_of_which_hardly_anything_is_usable_stop_at_once_in_training(tmp_path: Path) -> None:
    folder = write(tmp_path, 300, {n: {**sample(n), "txt": b""} for n in range(1, 300)}, per_shard=300)
    data = shards(folder)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"more than 1\.00% of the samples are unusable: .* empty captions in 1 file"):
        list(data.train_dataloader())


def test_bad_samples_at_the_start_of_good_data_do_not_stop_them(tmp_path: Path) -> None:
    folder = write(tmp_path, 200, {n: {**sample(n), "txt": b""} for n in range(20)}, per_shard=200)
    data = shards(folder, max_bad_fraction=0.2)
    data.setup("fit")
    assert len(list(data.train_dataloader())) == 50
    assert data.bad_samples()["train"]["empty captions"] == {f"{folder}/train-000000.tar": 20}


@pytest.mark.parametrize("indexed", [True, False])
def test_shards_without_the_member_that_was_named_tell_what_they_hold(tmp_path: Path, indexed: bool) -> None:
    folder = write(tmp_path, 20, {n: without(n, "txt") for n in range(16, 20)})
    if not indexed:
        for path in tmp_path.glob("*index.json"):
            path.unlink()
    with pytest.raises(
        ValueError,
        match=r"train: no caption \(txt\) in 1 of 2 shards; .*train-000001\.tar holds \.cls, \.json, \.png\. Name",
    ):
        shards(folder).setup("fit")
    with pytest.raises(ValueError, match=r"no caption \(caption.txt or text\) in 2 of 2 shards; .* \.png, \.txt\."):
        shards(folder, caption=["caption.txt", "text"]).setup("fit")
    with pytest.raises(ValueError, match=r"none of 16 samples tried .*no 'text' for json\.text; it has: captions"):
        shards(folder, caption="json.text").setup("fit")
    shards(folder, caption=["txt", "json.captions"]).setup("fit")


def test_a_caption_that_names_nothing_is_refused(folder: str) -> None:
    with pytest.raises(ValueError, match=r"^ImageTextShards: caption is an extension"):
        shards(folder, caption="")
