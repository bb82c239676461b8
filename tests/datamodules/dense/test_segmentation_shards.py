"""Shards with class maps: the same order, resume and counts as other shards, whatever the number of workers."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faulty_server import serve
from PIL import Image

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules import ImageShards, SegmentationFolder, SegmentationShards
from ssmpretrain.datamodules.shards import ShardWriter

SMALL: dict[str, Any] = {"batch_size": 4, "num_workers": 0, "image_size": 32}


def png(pixels: np.ndarray, kind: str = "png") -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


def sample(number: int) -> dict[str, bytes]:
    rng = np.random.default_rng(number)
    h, w = (int(side) for side in rng.integers(20, 50, 2))
    mask = rng.integers(0, 4, (h // 8 + 1, w // 8 + 1), dtype=np.uint8).repeat(8, 0).repeat(8, 1)[:h, :w]
    return {"jpg": png((mask[..., None] * np.array([40, 20, 60])).astype(np.uint8), "jpeg"), "seg.png": png(mask)}


@pytest.fixture
def write_shards(tmp_path: Path) -> Callable[..., str]:
    """Write 20 samples into three shards; `changes` replaces fields by number. Return their pattern."""

    def write(prefix: str = "train", changes: dict[int, dict[str, bytes]] | None = None, **more: bytes) -> str:
        with ShardWriter(tmp_path / prefix, prefix, samples_per_shard=8) as writer:
            for number in range(20):
                writer.write(f"{number:02d}", {**sample(number), **more, **(changes or {}).get(number, {})})
        (tmp_path / prefix / "classes.json").write_text(json.dumps(list("abcd")))
        return str(tmp_path / prefix / f"{prefix}-*.tar")

    return write


def equal(batch: dict[str, Any], other: dict[str, Any]) -> bool:
    same = all(torch.equal(batch[name], other[name]) for name in ("image", "mask", "size"))
    return same and batch["key"] == other["key"]


def epochs(data: SegmentationShards, count: int = 2) -> list[dict[str, Any]]:
    loader = data.train_dataloader()
    return [batch for _ in range(count) for batch in loader]


def test_any_number_of_workers_gives_the_same_batches(write_shards: Callable[..., str]) -> None:
    pattern = write_shards(changes={5: {"seg.png": b""}})
    alone = epochs(SegmentationShards(pattern, **SMALL))
    helped = epochs(SegmentationShards(pattern, **{**SMALL, "num_workers": 2}))
    assert len(alone) == 10 and all(equal(*pair) for pair in zip(alone, helped, strict=True))
    assert not torch.equal(alone[0]["image"], alone[5]["image"])


def test_a_run_that_stopped_goes_on_to_the_bit(write_shards: Callable[..., str]) -> None:
    pattern = write_shards()
    whole = epochs(SegmentationShards(pattern, **SMALL))
    data = SegmentationShards(pattern, **SMALL)
    loader = iter(data.train_dataloader())
    begun = [next(loader) for _ in range(3)]
    state = json.loads(json.dumps(data.state_dict()))
    further = SegmentationShards(pattern, **SMALL)
    further.load_state_dict(state)
    rest = epochs(further)
    assert all(equal(*pair) for pair in zip([*begun, *rest], whole, strict=True))


def test_two_ranks_share_the_samples(write_shards: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = write_shards()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    trained, evaluated = [], []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        data = SegmentationShards(pattern, pattern, **{**SMALL, "batch_size": 3})
        data.setup()
        trained += [key for batch in data.train_dataloader() for key in batch["key"]]
        evaluated += [key for batch in data.val_dataloader() for key in batch["key"]]
    assert len(trained) == len(set(trained)) == 18
    assert sorted(evaluated) == [f"{number:02d}" for number in range(20)]


GREY = np.zeros((30, 40), np.uint8)
WRONG = {  # what is wrong with sample 5: its cause
    "cut": ({**sample(5), "seg.png": sample(5)["seg.png"][:60]}, "undecodable masks"),
    "empty": ({"seg.png": b""}, "masks that are no PNG"),
    "web page": ({"seg.png": b"<html>no</html>"}, "masks that are no PNG"),
    "JPEG": ({"seg.png": png(GREY, "jpeg")}, "masks that are no PNG"),
    "colours": ({"jpg": png(GREY, "jpeg"), "seg.png": png(np.zeros((30, 40, 3), np.uint8))}, "masks in colours"),
    "transparent": ({"jpg": png(GREY, "jpeg"), "seg.png": png(np.zeros((30, 40, 4), np.uint8))}, "masks in colours"),
    "turned": ({"jpg": png(GREY.T.copy(), "jpeg"), "seg.png": png(GREY)}, "masks of another size"),
    "smaller": ({"jpg": png(GREY, "jpeg"), "seg.png": png(GREY[:-1])}, "masks of another size"),
    "class 4": ({"jpg": png(GREY, "jpeg"), "seg.png": png(GREY + 4)}, "numbers without a class"),
    "class 254": ({"jpg": png(GREY, "jpeg"), "seg.png": png(GREY + 254)}, "numbers without a class"),
    "16 bits": ({"jpg": png(GREY, "jpeg"), "seg.png": png(GREY.astype(np.uint16) + 300)}, "numbers without a class"),
    "giant": ({"seg.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + b"\0\1\0\0" * 2 + b"\x08\0\0\0\0" + bytes(9)}, "masks of"),
    "no image": ({"jpg": b"GIF89a"}, "undecodable images"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_mask_is_skipped_and_counted_by_cause(write_shards: Callable[..., str], fault: str) -> None:
    change, cause = WRONG[fault]
    data = SegmentationShards(write_shards(changes={5: change}), **SMALL)
    data.setup()
    batches = list(data.train_dataloader())
    assert len(batches) == 5 and all(len(batch["image"]) == 4 for batch in batches)
    (found,) = data.bad_samples()["train"]
    assert found.startswith(cause)


@pytest.mark.parametrize("fault", ["cut", "colours", "smaller", "class 4", "empty"])
def test_wrong_masks_alone_end_the_run_with_one_message(write_shards: Callable[..., str], fault: str) -> None:
    change, cause = WRONG[fault]
    data = SegmentationShards(write_shards(changes=dict.fromkeys(range(20), change)), **SMALL)
    with pytest.raises(DataError, match=f"train: none of 16 samples tried can be used: 16 {cause}"):
        data.setup()


def test_a_sample_without_a_mask_is_bad_and_a_shard_without_one_is_wrong(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "some", samples_per_shard=100) as writer:
        for number in range(20):
            writer.write(f"{number:02d}", sample(number) if number else {"jpg": sample(0)["jpg"]})
    data = SegmentationShards(str(tmp_path / "some-*.tar"), num_classes=4, **SMALL)
    data.setup()
    list(data.train_dataloader())
    assert list(data.bad_samples()["train"]) == ["images without a mask"]
    with ShardWriter(tmp_path, "none") as writer:
        writer.write("0", {"jpg": sample(0)["jpg"]})
    with pytest.raises(DataError, match=r"no class map \(.seg.png\) in 1 of 2 shards"):
        SegmentationShards(str(tmp_path / "*.tar"), num_classes=4, **SMALL).setup()


def test_the_classes_are_named_once(write_shards: Callable[..., str], tmp_path: Path) -> None:
    pattern = write_shards()
    assert SegmentationShards(pattern, **SMALL).classes == list("abcd")
    with pytest.raises(DataError, match=r"got 4 names in .*classes.json, and num_classes 5"):
        SegmentationShards(pattern, num_classes=5, **SMALL).setup()
    (tmp_path / "train/classes.json").unlink()
    with pytest.raises(DataError, match="Give the names as classes, or their number as num_classes"):
        SegmentationShards(pattern, **SMALL).setup()
    SegmentationShards(pattern, num_classes=4, **SMALL).setup()


def test_validation_in_another_order_of_classes_is_renumbered_by_name(
    write_shards: Callable[..., str], tmp_path: Path
) -> None:
    train, val = write_shards(), write_shards("val")
    (tmp_path / "val/classes.json").write_text(json.dumps(list("dcba")))
    data = SegmentationShards(train, val, **SMALL)
    data.setup()
    batch = next(iter(data.val_dataloader()))
    stored = np.asarray(Image.open(io.BytesIO(sample(0)["seg.png"])))
    assert batch["whole_mask"][0].tolist() == (3 - stored).tolist()
    (tmp_path / "val/classes.json").write_text(json.dumps(list("abcx")))
    with pytest.raises(DataError, match="got x, which the latter lacks"):
        SegmentationShards(train, val, **SMALL).setup()


def test_the_names_of_pixels_are_no_labels_of_images(write_shards: Callable[..., str]) -> None:
    data = ImageShards(write_shards(), batch_size=4, num_workers=0, image_size=16)
    data.setup()
    assert data.classes == [] and next(iter(data.train_dataloader()))["label"].tolist() == [-1] * 4


def test_one_list_beside_labels_and_class_maps_is_not_guessed_at(write_shards: Callable[..., str]) -> None:
    pattern = write_shards(cls=b"1")
    with pytest.raises(DataError, match=r"shards that also have labels \(.cls\), whose classes it may name instead"):
        SegmentationShards(pattern, **SMALL).setup()
    SegmentationShards(pattern, classes=list("abcd"), **SMALL).setup()


def test_copies_of_an_image_share_its_batch(write_shards: Callable[..., str]) -> None:
    data = SegmentationShards(write_shards(), repeats=2, **SMALL)
    batch = next(iter(data.train_dataloader()))
    assert len(set(batch["key"])) == 2 and len({image.sum().item() for image in batch["image"]}) == 4


def test_a_folder_and_the_shards_packed_from_it_evaluate_alike(
    write_folder: Callable[..., Path], tmp_path: Path
) -> None:
    from ssmpretrain.cli import main

    folder = write_folder()
    images, masks = str(folder / "images"), str(folder / "masks")
    class_map = '{"0": "road", "1": 255, "2": "sky", "3": "road"}'
    out = tmp_path / "shards"
    assert main(["shards", "pack", images, str(out), "--masks", masks, "--class-map", class_map]) == 0
    assert main(["shards", "verify", str(out)]) == 0
    options: dict[str, Any] = {"class_map": {0: "road", 1: 255, 2: "sky", 3: "road"}}
    loose = SegmentationFolder(images, images, train_masks=masks, val_masks=masks, **options, **SMALL)
    packed = SegmentationShards(str(out), str(out), **SMALL)
    assert loose.classes == packed.classes == ["road", "sky"]

    def by_key(data: Any) -> dict[str, list[list[int]]]:
        batches = list(data.val_dataloader())
        return {
            Path(key).stem: mask.tolist()
            for batch in batches
            for key, mask in zip(batch["key"], batch["whole_mask"], strict=True)
        }

    assert by_key(loose) == by_key(packed) and len(by_key(packed)) == 20


def test_shards_on_a_server_give_the_batches_of_local_ones(write_shards: Callable[..., str], tmp_path: Path) -> None:
    pattern = write_shards()
    with serve(tmp_path / "train") as site:
        url = f"{site.url}/train-{{000000..000002}}.tar"
        remote = SegmentationShards(url, cache=str(tmp_path / "cache"), cache_limit="10M", **SMALL)
        assert remote.classes == list("abcd")
        batches = epochs(remote, 1)
    local = epochs(SegmentationShards(pattern, **SMALL), 1)
    assert all(equal(*pair) for pair in zip(batches, local, strict=True))
