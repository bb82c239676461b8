"""Lists of classes beside shards, and their comparison when two sets are used together."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_server import serve
from torchvision.io import encode_png

from ssmpretrain.datamodules import ImageFolder, ImageShards
from ssmpretrain.datamodules.files.image_files import find_images
from ssmpretrain.datamodules.image_data import ImageData
from ssmpretrain.datamodules.labels.classes import CLASSES_FILE, Classes, Labels, parse_classes
from ssmpretrain.datamodules.shards.pack import ShardWriter, pack_folder

SMALL: dict[str, Any] = {"batch_size": 4, "num_workers": 0, "image_size": 8}
PACKING: dict[str, Any] = {"prefix": "p", "samples_per_shard": 4, "bytes_per_shard": 1 << 30, "seed": 0}
Write = Callable[..., Path]


def png(number: int) -> bytes:
    return bytes(encode_png(torch.full((3, 8, 8), number, dtype=torch.uint8)).tolist())


@pytest.fixture
def images(tmp_path: Path) -> Write:
    """Writes an image folder with two images of each class, the class in the name of the file too."""

    def write(name: str, classes: Sequence[str]) -> Path:
        for number, cls in enumerate(classes):
            (tmp_path / name / cls).mkdir(parents=True)
            for copy in range(2):
                (tmp_path / name / cls / f"{cls}{copy}.png").write_bytes(png(2 * number + copy))
        return tmp_path / name

    return write


@pytest.fixture
def packed(images: Write, tmp_path: Path) -> Write:
    """Packs such a folder by itself, as `shards pack` does."""

    def pack(name: str, classes: Sequence[str], order: Sequence[str] | None = None) -> Path:
        listed = Classes(tuple(order), "list") if order else None
        pack_folder(
            find_images(images(f"{name}-images", classes), where="x"), tmp_path / name, classes=listed, **PACKING
        )
        return tmp_path / name

    return pack


def labels(data: ImageData, split: str = "val") -> dict[str, set[int]]:
    """The labels of each class of files."""
    found: dict[str, set[int]] = {}
    for batch in data.val_dataloader() if split == "val" else data.bank_dataloader():
        for key, label in zip(batch["key"], batch["label"].tolist(), strict=True):
            found.setdefault(key.partition("/")[0], set()).add(label)
    return found


def shards(train: Any, val: Any = None) -> ImageShards:
    train, val = (list(map(str, one)) if isinstance(one, list) else one and str(one) for one in (train, val))
    return ImageShards(train, val, **SMALL)


# Two sets


def test_sets_packed_apart_get_the_same_labels_by_the_names(packed: Write, caplog: pytest.LogCaptureFixture) -> None:
    data = shards(packed("train", "abc"), packed("val", "ac"))
    data.setup("fit")
    assert labels(data) == {"a": {0}, "c": {2}} and labels(data, "train") == {"a": {0}, "b": {1}, "c": {2}}
    [line] = caplog.messages
    assert "val: the labels of" in line and "(a, c) are numbered as in" in line and "(a, b, c), by the names" in line
    assert data.classes == ["a", "b", "c"]


def test_equal_lists_and_sets_without_lists_change_and_say_nothing(
    packed: Write, make_shards, caplog: pytest.LogCaptureFixture
) -> None:
    data = shards(packed("train", "abc"), packed("val", "ac", order="abc"))
    assert labels(data) == {"a": {0}, "c": {2}}
    unknown = shards(make_shards([6]), make_shards([6], prefix="val"))
    assert labels(unknown) == {f"{number:04d}": {number} for number in range(6)} and unknown.classes == []
    assert caplog.messages == []


def test_a_class_that_training_lacks_is_refused_where_labels_are_used_with_both_lists_and_what_to_do(
    packed: Write, images: Write, caplog: pytest.LogCaptureFixture
) -> None:
    train, val = packed("train", "abc"), packed("val", "ad")
    data = shards(train, val)
    data.setup("fit")
    assert labels(data) == {"a": {-1}, "d": {-1}} and labels(data, "train") == {"a": {0}, "b": {1}, "c": {2}}
    assert "got d, which the latter lacks" in caplog.text and "Until then its images have no label." in caplog.text
    with pytest.raises(ValueError) as error:
        data.use_labels()
    text = str(error.value)
    assert f"ImageShards: val: the classes of {val}/classes.json are among those of {train}/classes.json" in text
    assert "(a, b, c); got d, which the latter lacks" in text and "shards pack --classes" in text
    with pytest.raises(ValueError, match=r"got e, which the latter lacks"):
        folders = ImageFolder(str(images("f", "ab")), str(images("g", "ae")), **SMALL)
        folders.setup("fit")
        folders.use_labels()


def test_where_one_set_alone_has_a_list_that_is_said(packed: Write, caplog: pytest.LogCaptureFixture) -> None:
    train, val = packed("train", "abc"), packed("val", "abc")
    (val / CLASSES_FILE).unlink()
    data = shards(train, val)
    data.setup("fit")
    assert labels(data) == {"a": {0}, "b": {1}, "c": {2}}
    [line] = caplog.messages
    assert f"the classes of the labels of {val} are not known; they are assumed to be those of {train}/classes" in line


def test_the_list_of_a_checkpoint_numbers_folders_and_shards(packed: Write, images: Write) -> None:
    for data in (shards(packed("s", "ab")), ImageFolder(str(images("f", "ab")), **SMALL)):
        before = labels(data, "train")
        data.label_by(["c", "b", "a"], "a checkpoint")
        assert before == {"a": {0}, "b": {1}} and labels(data, "train") == {"a": {2}, "b": {1}}
        assert data.classes == ["c", "b", "a"]
        with pytest.raises(ValueError, match=r"among those of a checkpoint \(c, a\); got b, which the latter lacks"):
            data.label_by(["c", "a"], "a checkpoint")


def test_training_images_of_two_sources_are_numbered_alike_or_stay_without_labels(
    packed: Write, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, other = packed("first", "abc"), packed("second", "ca"), packed("other", "xy")
    assert labels(shards([first, second]), "train") == {"a": {0}, "b": {1}, "c": {2}}
    data = shards([first, other])
    assert labels(data, "train") == {"a": {0}, "b": {1}, "c": {2}, "x": {-1}, "y": {-1}}
    assert "got x, y, which the latter lacks" in caplog.messages[-1]
    with pytest.raises(ValueError, match="got x, y, which the latter lacks"):
        data.use_labels()


def test_the_list_of_shards_on_a_server_is_read_beside_them(packed: Write, tmp_path: Path) -> None:
    train, val = packed("train", "abc"), packed("val", "ac")
    with serve(val) as site:
        data = ImageShards(str(train), f"{site.url}/p-000000.tar", cache=str(tmp_path / "cache"), **SMALL)
        assert labels(data) == {"a": {0}, "c": {2}}
        assert site.requests["GET classes.json"] == 1


def test_validation_data_alone_can_be_read(packed: Write, tmp_path: Path) -> None:
    data = shards(tmp_path / "gone", packed("val", "ac"))
    data.setup("validate")
    assert labels(data) == {"a": {0}, "c": {1}}
    data.label_by("abc", "a checkpoint")
    assert labels(data) == {"a": {0}, "c": {2}}


def test_a_numbering_is_said_once(packed: Write, caplog: pytest.LogCaptureFixture) -> None:
    data = shards(packed("train", "abc"), packed("val", "ac"))
    data.setup("fit")
    data.use_labels()
    data.label_by("abc", "a checkpoint that says the same")
    assert len(caplog.messages) == 1 and labels(data) == {"a": {0}, "c": {2}}
    data.label_by("cab", "another")
    assert labels(data) == {"a": {1}, "c": {0}}
    assert ["train: the labels of" in line or "val: the labels of" in line for line in caplog.messages[1:]] == [
        True
    ] * 2


# Labels


def shard_of(folder: Path, *fields: dict[str, bytes], names: Sequence[str] | None = None) -> Path:
    with ShardWriter(folder, "train") as writer:
        for number, field in enumerate(fields):
            writer.write(f"{number}", {"png": png(number), **field})
    if names:
        (folder / CLASSES_FILE).write_text(json.dumps(names))
    return folder


UNREADABLE = ({"cls": b"cat"}, {"cls": b"-2"}, {"cls": b""}, {"cls": b"7.5"}, {"cls": b"\xff"}, {"json": b"{"})
UNREADABLE += ({"json": b'{"label": true}'}, {"json": b'{"label": "dog"}'}, {"json": b'{"label": [1]}'})


def test_labels_that_cannot_be_read_are_none_until_labels_are_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = shards(shard_of(tmp_path / "s", *UNREADABLE))
    data.setup("fit")
    assert labels(data, "train") == {str(number): {-1} for number in range(len(UNREADABLE))}
    assert not data.bad_samples()["bank"]
    assert labels(data, "train")  # counted in the first pass alone
    line, count = caplog.messages
    assert (
        "train: 0 in" in line
        and "counts as unlabelled" in line
        and "a classes.json beside the shards; got 'cat'" in line
    )
    assert "train: 9 labels cannot be read and count as none, such as 0 in" in count and "; got 'cat'." in count
    with pytest.raises(ValueError, match=r"none of 9 samples tried can be used: 9 bad labels .*; got 'cat'\)"):
        data.use_labels()


@pytest.mark.parametrize("workers", [0, 2])
def test_labels_behind_the_first_that_cannot_be_read_are_counted(
    workers: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fields = [{"cls": text} for text in (b"1.0", b"2.5", b"cat", b"cow", b"-1", b"0")]
    folder = str(shard_of(tmp_path / "s", *fields, {}, names=["cat", "dog"]))
    data = ImageShards(folder, folder, **{**SMALL, "num_workers": workers, "batch_size": 2})
    data.setup("fit")
    next(iter(data.val_dataloader()))  # as a check before training
    caplog.clear()
    assert [label for one in labels(data).values() for label in one] == [1, -1, 0, -1, -1, 0, -1]
    [line] = caplog.messages
    assert "val: 2 labels cannot be read and count as none, such as" in line


def test_where_labels_are_used_nothing_is_said_to_count_as_unlabelled(
    packed: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for data in (shards(shard_of(tmp_path / "s", *UNREADABLE)), shards(packed("t", "ab"), packed("v", "ax"))):
        data.setup("fit")
        with pytest.raises(ValueError, match=r"bad labels|lacks"):
            data.use_labels()
    assert caplog.messages == []


def test_numbers_are_read_however_they_are_written_and_minus_one_is_none(tmp_path: Path) -> None:
    written = (b"7", b" 7\n", b"\xef\xbb\xbf7", b"7.0", b"+7", b"-1", b"-1.0")
    fields = [{"cls": text} for text in written] + [
        {"json": b'{"label": %s}' % text} for text in (b"7.0", b'"7"', b"-1")
    ]
    data = shards(shard_of(tmp_path / "s", *fields))
    data.use_labels()
    read = [label for labels_of in labels(data, "train").values() for label in labels_of]
    assert read == [7, 7, 7, 7, 7, -1, -1, 7, 7, -1]


def test_a_list_of_classes_reads_names_and_bounds_numbers(tmp_path: Path) -> None:
    fields = (
        {"cls": b"dog"},
        {"json": b'{"label": "cat"}'},
        {"cls": b"1"},
        {"cls": b"2"},
        {"cls": b"wolf"},
        {"cls": b"0"},
    )
    data = ImageShards(str(shard_of(tmp_path / "s", *fields, names=["cat", "dog"])), **SMALL, max_bad_fraction=0.5)
    data.use_labels()
    assert labels(data, "train") == {"0": {1}, "1": {0}, "2": {1}, "5": {0}}
    details = [record["detail"] for record in data.bad_records()]
    assert (
        "names 2 classes; got label 2" in details[0]
        and "or a name that is in" in details[1]
        and "got 'wolf'" in details[1]
    )


def test_names_are_numbered_by_the_first_list_too() -> None:
    first, own = Classes(("a", "b", "c"), "first"), Classes(("c", "a"), "own")
    mapped, unlisted = Labels(own), Labels(Classes((), "nobody"))
    for one in (mapped, unlisted):
        one.number_by(first, where="x")
        assert [one.read({"cls": name}) for name in (b"a", b"b", b"c")] == [0, 1, 2]
    assert (mapped.read({"cls": b"0"}), unlisted.read({"cls": b"0"})) == (2, 0)


@pytest.mark.parametrize("text", ["a\nb\n", '["a", "b"]', '{"1": "b", "0": "a"}', '{"b": 1, "a": 0}', "\ufeffa\r\nb"])
def test_a_list_is_lines_or_json(text: str) -> None:
    assert parse_classes(text.encode(), "x").names == ("a", "b")


@pytest.mark.parametrize(
    "text", ["", "a\n\nb", "[]", '["a", 1]', '{"a": "b"}', '{"a": 0, "b": 0}', "[", "[" * 100_000, '"a']
)
def test_something_else_is_no_list_and_beside_shards_it_is_passed_over(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if text != '"a':  # which is a name
        with pytest.raises(ValueError, match=r"x: is no list of classes.*one name a line, or JSON"):
            parse_classes(text.encode(), "x")
    folder = shard_of(tmp_path / "s", {"cls": b"1"}, {"cls": b"0"})
    (folder / CLASSES_FILE).write_bytes(b"\xff\xfe" if text == '"a' else text.encode())
    assert labels(shards(folder), "train") == {"0": {1}, "1": {0}}
    assert "is no list of classes" in caplog.messages[0] and "It is ignored" in caplog.messages[0]


# Packing


def test_pack_numbers_classes_by_the_list_of_another_set(images: Write, packed: Write, tmp_path: Path) -> None:
    train = packed("train", "abc")
    listed = parse_classes((train / CLASSES_FILE).read_bytes(), "train/classes.json")
    files = find_images(images("val", "ac"), where="x")
    pack_folder(files, tmp_path / "out", classes=listed, **PACKING)
    assert json.loads((tmp_path / "out" / CLASSES_FILE).read_text()) == ["a", "b", "c"]
    assert labels(shards(tmp_path / "out"), "train") == {"a": {0}, "c": {2}}
    pack_folder(files, train, classes=listed, **{**PACKING, "prefix": "val"})  # beside the shards of the same classes
    for classes in (None, Classes(("a", "c"), "list")):
        with pytest.raises(FileExistsError, match=r"already holds classes\.json.* --classes .*train/classes\.json"):
            pack_folder(files, train, classes=classes, **{**PACKING, "prefix": "more"})


def test_the_list_is_there_before_the_first_shard_and_leaves_with_the_last(images: Write, tmp_path: Path) -> None:
    def interrupted(numbers: Iterable[int]) -> Iterator[int]:
        yield from list(numbers)[:5]
        raise KeyboardInterrupt

    files = find_images(images("train", "abc"), where="x")
    with pytest.raises(KeyboardInterrupt):
        pack_folder(files, tmp_path / "out", progress=interrupted, **PACKING)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        CLASSES_FILE, "p-000000.index.json", "p-000000.tar",
    ]  # fmt: skip
    for path in (tmp_path / "train").rglob("*.png"):
        path.write_bytes(b"")
    for folder, left in (("out", True), ("none", False)):
        with pytest.raises(ValueError, match="no image could be read"):
            pack_folder(files, tmp_path / folder, **{**PACKING, "prefix": "q"})
        assert (tmp_path / folder / CLASSES_FILE).exists() == left


def test_pack_refuses_a_list_that_does_not_fit(images: Write, tmp_path: Path) -> None:
    files = find_images(images("val", "ac"), where="x")
    flat = find_images(tmp_path / "val" / "a", where="x")
    for found, names, message in (
        (files, "ab", r"got c in .*val, which list lacks"),
        (files, "aca", "a class is named once; list has a name twice"),
        (flat, "ac", "whose images lie in no folder"),
    ):
        with pytest.raises(ValueError, match=message):
            pack_folder(found, tmp_path / "out", classes=Classes(tuple(names), "list"), **PACKING)
    assert not (tmp_path / "out").exists()
