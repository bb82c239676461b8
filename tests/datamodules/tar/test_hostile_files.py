"""Hostile or damaged tars and indexes are counted or refused within seconds."""

import json
import os
import random
import signal
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules import ImageShards
from ssmpretrain.datamodules.faults.bad_samples import BadSample
from ssmpretrain.datamodules.shards.describe import load_index, load_indexes
from ssmpretrain.datamodules.shards.folder_index import NAME, parse_counts, parse_folder_index, write_folder_indexes
from ssmpretrain.datamodules.splits.shard_split import ShardBatches
from ssmpretrain.datamodules.tar.index import index_path, locate_samples, read_index, walk
from ssmpretrain.datamodules.tar.walk import walk_tar

MUTATIONS = 200


@contextmanager
def seconds(limit: float) -> Iterator[None]:
    """Fail if the block takes longer than the limit, even if it would never end."""

    def stop(*args: object) -> None:
        pytest.fail(f"not done after {limit} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def evaluated(folder: Path, **options: Any) -> tuple[list[str], dict[str, int]]:
    """Return the keys that an evaluation of the shards yields, and the counts of bad samples before and after it."""
    options = {"batch_size": 4, "num_workers": 0, "image_size": 8, "max_bad_fraction": 1.0, **options}
    data = ImageShards(f"{folder}/train-*.tar", **options)
    data.setup("fit")
    keys = [key for batch in data.bank_dataloader() for key in batch["key"]]
    counted: dict[str, int] = {}
    for causes in data.bad_samples().values():
        for cause, files in causes.items():
            counted[cause] = counted.get(cause, 0) + sum(files.values())
    return keys, counted


def header(name: str, kind: bytes = b"0", size: int = 0, **fields: tuple[int, bytes]) -> bytes:
    """Return a header with the right checksum; `fields` gives bytes by their place."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT)[:512])
    for place, content in fields.values():
        block[place : place + len(content)] = content
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(content: bytes) -> bytes:
    return header("x", b"x", len(content)) + content + bytes(-len(content) % 512)


def record(key: bytes, value: bytes) -> bytes:
    """A pax record."""
    length = len(key) + len(value) + 3
    length += len(str(length + len(str(length))))
    return b"%d %s=%s\n" % (length, key, value)


HUGE = b"1" + b"0" * 30
HOSTILE = {
    "a negative size": header("b.png", at=(124, b"\xff" * 10 + b"\xfa\0")),
    "a size of 2^88": header("b.png", at=(124, b"\x80" + b"\xff" * 11)),
    "a size in letters": header("b.png", at=(124, b"12 34 56 78z")),
    "a pax size of 10^30": pax(record(b"size", HUGE)) + header("b.png"),
    "a negative pax size": pax(record(b"size", b"-5120")) + header("b.png"),
    "a pax size that is none": pax(record(b"size", b"1_0")) + header("b.png"),
    "a pax header of 8 GiB": header("x", b"x", 8 << 30) + header("b.png"),
    "a long name of 8 GiB": header("x", b"L", 8 << 30) + header("b.png"),
    "a pax record longer than its header": pax(b"99999 path=b.png\n") + header("b.png"),
    "a pax record of length 0": pax(b"0 path=b.png\n") + header("b.png"),
    "pax headers in a row": pax(record(b"path", b"b.png")) * 3000 + header("b.png"),
    "long names in a row": (header("x", b"L", 5) + b"b.png" + bytes(507)) * 3000 + header("b.png"),
    "sizes for all files": header("g", b"g", 13) + record(b"size", b"5120") + bytes(499) + header("b.png"),
    "many pax records": pax(record(b"path", b"b.png") * 40_000) + header("b.png"),
    "a name of a million characters": pax(record(b"path", b"b" * (1 << 20) + b".png")) + header("b.png"),
    "a sparse file without end": header("b.png", b"S", at=(482, b"\1")) + header("c.png", at=(504, b"\1")) * 3000,
    "a sparse map that is none": pax(record(b"GNU.sparse.map", b"a,b") + record(b"GNU.sparse.size", b"z"))
    + header("b.png"),
    "a sparse map of 10^30 pieces": pax(record(b"GNU.sparse.major", b"1") + record(b"GNU.sparse.minor", b"0"))
    + header("b.png", size=512)
    + HUGE
    + bytes(481),
    "headers of no file": b"".join(header(f"{number}.png", at=(100, b"z" * 8)) + b"\1" * 512 for number in range(3000)),
}
HARMLESS = ("a sparse map that is none", "a sparse map of 10^30 pieces")  # to a sample that they follow


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_header_ends_and_costs_what_is_counted(make_shards, what: str, indexed: bool) -> None:
    folder = make_shards([6])
    path = folder / "train-000000.tar"
    content, offset = path.read_bytes(), int(locate_samples(path).offsets[3])
    path.write_bytes(content[:offset] + HOSTILE[what] + content[offset:])
    if indexed:  # by somebody who says what he likes: the hostile bytes are a part of the third sample
        said = json.loads(index_path(path).read_text())
        added = len(HOSTILE[what])
        offsets = [start + added * (number > 2) for number, start in enumerate(said["offsets"])]
        said |= {"offsets": offsets, "bytes": path.stat().st_size, "crc32": None}
        del said["check"]
        index_path(path).write_text(json.dumps(said))
    else:
        index_path(path).unlink()
    with seconds(10):
        keys, counted = evaluated(folder)
    whole = {f"{number:04d}" for number in range(6)}
    assert whole - set(keys) <= {"0002"} and set(keys) - whole <= {"b"}
    assert sum(counted.values()) >= 1 or what in HARMLESS


def test_a_tar_that_is_mutated_at_random_ends_in_what_is_counted(make_shards) -> None:
    path = make_shards([4]) / "train-000000.tar"
    index_path(path).unlink()
    content = path.read_bytes()
    end = content.index(b"0001.png")
    content = content[:end] + pax(record(b"path", b"0001.png") + record(b"size", b"%d" % 600)) + content[end:]
    chance = random.Random(0)
    for _ in range(MUTATIONS):
        mutated = bytearray(content)
        for _ in range(chance.randint(1, 4)):
            place = chance.choice((chance.randrange(len(content)), chance.randrange(512), end + chance.randrange(1024)))
            mutated[place] = chance.choice((0, 0x20, 0x2D, 0x30, 0x39, 0x80, 0xFF, chance.randrange(256)))
        for start in range(0, len(mutated), 512):  # so that more than the checksum is looked at
            if mutated[start + 257 : start + 262] == b"ustar" and chance.random() < 0.8:
                mutated[start + 148 : start + 156] = b" " * 8
                mutated[start + 148 : start + 156] = b"%06o\0 " % sum(mutated[start : start + 512])
        path.write_bytes(mutated)
        os.utime(path, ns=(chance.randrange(1 << 60),) * 2)
        with seconds(5):
            read_all(path)


def read_all(path: Path) -> None:
    """Read each sample that a walk finds, as training does."""
    walked = walk_tar(path)
    assert (walked.offsets[1:] > walked.offsets[:-1]).all()
    with suppress(DataError):
        batches = batches_of(path)
        for number in range(len(walked.offsets)):
            with suppress(BadSample):
                batches.read(0, number)


def batches_of(path: Path) -> ShardBatches:
    return ImageShards(str(path), batch_size=1, image_size=8)._batches("train", train=False, limit=None)


def test_an_index_that_is_mutated_at_random_is_refused_or_as_long_as_its_shard(make_shards) -> None:
    folder = make_shards([5])
    path = folder / "train-000000.tar"
    write_folder_indexes([load_index(path)])
    chance = random.Random(1)
    values: list[Any] = [-1, 0, 3, 10**30, 1.0, True, None, "", "5", [], {}, float("nan"), float("inf"), [[]] * 5]
    for number in range(MUTATIONS):
        file = index_path(path) if number % 2 else folder / NAME
        whole = file.read_text()
        said = json.loads(whole)
        said.pop("check", None)
        inner = said if number % 2 else said["shards"][path.name]
        for key in chance.sample(sorted(inner), chance.randint(1, 2)):
            inner[key] = chance.choice(values)
            if key in ("offsets", "crc32") and chance.random() < 0.5:
                inner[key] = [chance.choice(values) if chance.random() < 0.3 else place for place in range(5)]
        text = bytearray(json.dumps(said).encode())
        if chance.random() < 0.3:
            text[chance.randrange(len(text))] = chance.randrange(256)
        file.write_bytes(text)
        with seconds(5):
            indexes = load_indexes([path])
            parse_counts(bytes(text))
        assert isinstance(indexes[0], DataError) or indexes[0].samples in (5, 3)
        if not isinstance(indexes[0], DataError) and indexes[0].samples == 3:  # possible, and found when it is read
            with pytest.raises(BadSample, match="other than its index said"):
                batches_of(path).read(0, 0)
        file.write_text(whole)


NESTED = b"[" * 100_000
LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a negative number of samples": lambda said: said.update(samples=-3),
    "a negative number of bytes": lambda said: said.update(bytes=-5),
    "10^30 samples": lambda said: said.update(samples=10**30),
    "true samples": lambda said: said.update(samples=True),
    "half a sample": lambda said: said.update(samples=4.5),
    "samples in words": lambda said: said.update(samples="5"),
    "no sample of many files": lambda said: said.update(samples=0),
    "more samples than files": lambda said: said.update(samples=11),
    "more files than blocks": lambda said: said.update(extensions={"png": 10**9}),
    "a negative number of files": lambda said: said.update(extensions={"png": -5}),
    "files in a list": lambda said: said.update(extensions=["png"]),
    "a checksum that is none": lambda said: said.update(sha256="x" * 64),
    "a checksum in a list": lambda said: said.update(sha256=[]),
}
OFFSETS: dict[str, Callable[[dict[str, Any]], object]] = {
    "10^30": lambda said: said["offsets"].__setitem__(2, 10**30),
    "negative": lambda said: said["offsets"].__setitem__(0, -512),
    "backwards": lambda said: said["offsets"].reverse(),
    "twice": lambda said: said["offsets"].__setitem__(2, said["offsets"][1]),
    "no multiple of a block": lambda said: said["offsets"].__setitem__(2, said["offsets"][2] + 1),
    "behind the end": lambda said: said["offsets"].__setitem__(4, said["bytes"] + 512),
    "floats": lambda said: said.update(offsets=[float(place) for place in said["offsets"]]),
    "a text": lambda said: said.update(offsets="01234"),
    "too few": lambda said: said["offsets"].pop(),
    "deep": lambda said: said.update(offsets=[[[]]] * 5),
    "negative checksums": lambda said: said.update(crc32=[-1] * 5),
    "too few checksums": lambda said: said.update(crc32=said["crc32"][:3]),
    "repeated in a number": lambda said: said.update(repeated=3),
    "repeated that are not there": lambda said: said.update(repeated=[7]),
    "repeated of another kind": lambda said: said.update(repeated=[[1]]),
    "the first left out": lambda said: said.update(offsets=said["offsets"][1:], samples=4, crc32=said["crc32"][1:]),
}


@pytest.mark.parametrize("what", [*LIES, *OFFSETS])
def test_an_index_that_cannot_be_is_not_believed_and_every_sample_is_read(make_shards, what: str, caplog) -> None:
    folder = make_shards([5, 4])
    file = index_path(folder / "train-000000.tar")
    said = json.loads(file.read_text())
    (LIES | OFFSETS)[what](said)
    said.pop("check")
    file.write_text(json.dumps(said))
    keys, counted = evaluated(folder)
    if what == "the first left out":  # possible, as other files may come first; found when it is read
        assert counted == {"changed shards": 4}
    else:
        assert keys == [f"{number:04d}" for number in range(9)]
        assert counted == {}
        assert "train-000000.index.json, the index of train-000000.tar," in caplog.text
        assert "Write the indexes again with `ssmpretrain shards index`." in caplog.text
        assert "Fetch" not in caplog.text


@pytest.mark.parametrize("what", LIES)
def test_a_folder_index_that_cannot_be_is_not_believed_which_is_said(make_shards, what: str, caplog) -> None:
    folder = make_shards([5, 4])
    write_folder_indexes(map(load_index, sorted(folder.glob("*.tar"))))
    said = json.loads((folder / NAME).read_text())
    LIES[what](said["shards"]["train-000000.tar"])
    (folder / NAME).write_text(json.dumps(said))
    keys, counted = evaluated(folder)
    assert (keys, counted) == ([f"{number:04d}" for number in range(9)], {})
    assert "index.json: is ignored for 1 of its 2 shards: of 'train-000000.tar' it" in caplog.text


def test_a_folder_index_that_is_not_believed_is_written_anew(make_shards) -> None:
    folder = make_shards([5, 4])
    indexes = [load_index(path) for path in sorted(folder.glob("*.tar"))]
    write_folder_indexes(indexes)
    whole = (folder / NAME).read_text()
    (folder / NAME).write_text(whole.replace('"samples": 5', '"samples": -5'))
    write_folder_indexes(indexes[:1])
    assert (folder / NAME).read_text() == whole


@pytest.mark.parametrize(
    "text",
    [
        NESTED,
        b'{"format": "ssmpretrain shards", "version": 1, "shards": ' + NESTED,
        b'{"format": "ssmpretrain shards", "version": 1, "shards": []}',
        b'{"splits": {"a": {"filenames": [["a.tar"]], "shard_lengths": [3]}}}',
        b'{"a.tar": ' + b"9" * 5000 + b"}",
        b'{"a.tar": true, "b.tar": 1.0, "c.tar": -1, "d.tar": 1e400, "e.tar": NaN}',
        b"\xff\xfe{",
    ],
)
def test_json_beyond_reason_says_nothing(text: bytes) -> None:
    assert parse_folder_index(text, "x") is None
    assert parse_counts(text) == {}


@pytest.mark.parametrize("number", [0, -4, 10**30, True, 1000])
def test_a_number_of_samples_that_cannot_be_is_not_believed(make_shards, number: int) -> None:
    folder = make_shards([5, 4])
    for path in folder.glob("*.index.json"):
        path.unlink()
    (folder / "sizes.json").write_text(json.dumps({"train-000000.tar": number, "train-000001.tar": 4}))
    assert evaluated(folder) == ([f"{number:04d}" for number in range(9)], {})


def test_numbers_below_what_shards_hold_are_said(make_shards, caplog) -> None:
    folder = make_shards([5, 4])
    for path in folder.glob("*.index.json"):
        path.unlink()
    (folder / "sizes.json").write_text(json.dumps({"train-000000.tar": 3, "train-000001.tar": 4}))
    assert len(evaluated(folder)[0]) == 7
    assert "train-000000.tar: has 5 samples, and _info.json or sizes.json say 3: the others are not" in caplog.text


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


ENDLESS: dict[str, Callable[[Path], None]] = {
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a pipe": make_fifo,
    "a folder": lambda path: path.mkdir(),
    "a link to itself": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_what_is_no_file_is_not_read_as_a_shard(make_shards, what: str) -> None:
    folder = make_shards([5])
    ENDLESS[what](folder / "train-000001.tar")
    with (
        seconds(10),
        pytest.raises((DataError, OSError), match=r"train-000001\.tar.*(Not a regular file|symbolic links)"),
    ):
        evaluated(folder)


@pytest.mark.parametrize("name", ["train-000000.index.json", "index.json", "sizes.json"])
@pytest.mark.parametrize("what", ["a device", "a pipe", "a folder"])
def test_what_is_no_file_is_not_read_as_an_index(make_shards, name: str, what: str, caplog) -> None:
    folder = make_shards([5])
    (folder / name).unlink(missing_ok=True)
    ENDLESS[what](folder / name)
    with seconds(10):
        keys, counted = evaluated(folder)
    assert len(keys) == 5
    assert counted == {}
    if not name.startswith("train"):
        assert f"{name}: is not read (Not a regular file)" in caplog.text


def test_a_flipped_bit_of_an_index_is_found_wherever_it_is(make_shards) -> None:
    path = index_path(make_shards([3]) / "train-000000.tar")
    whole = path.read_bytes()
    for place in range(0, whole.index(b'"check"'), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DataError):
            read_index(path)


def test_links_to_shards_are_followed(make_shards, tmp_path: Path) -> None:
    folder = make_shards([5])
    (tmp_path / "links").mkdir()
    (tmp_path / "links/train-000000.tar").symlink_to(folder / "train-000000.tar")
    assert len(evaluated(tmp_path / "links")[0]) == 5


def test_a_walk_passes_over_holes(make_shards) -> None:
    path = make_shards([2]) / "train-000000.tar"
    with path.open("r+b") as file:
        file.truncate(1 << 40)  # zeros that take no room
    with seconds(10):
        assert walk(path)[0].samples == 2
