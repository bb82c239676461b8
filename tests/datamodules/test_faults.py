"""Shards that are damaged in every way that we know: what a run makes of them."""

import errno
import io
import logging
import os
import pickle
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from PIL import Image

from ssmpretrain.datamodules import ImageFolder, ImageShards, image_folder
from ssmpretrain.datamodules.decoding.image_header import pixel_size
from ssmpretrain.datamodules.decoding.samples import decode_rgb
from ssmpretrain.datamodules.files import patience
from ssmpretrain.datamodules.shards import index, reading, tar_walk
from ssmpretrain.datamodules.shards.index import load_layout
from ssmpretrain.datamodules.shards.shard_index import index_path, write_index
from ssmpretrain.datamodules.shards.tar_walk import Walked

SMALL: dict[str, Any] = {"batch_size": 4, "num_workers": 0, "image_size": 8}


def shards(folder: Path, **options: Any) -> ImageShards:
    return ImageShards(f"{folder}/train-*.tar", **{**SMALL, **options})


def evaluated(data: ImageShards) -> list[int]:
    """The samples that evaluation of the training shards yields."""
    return [int(key) for batch in data.bank_dataloader() for key in batch["key"]]


def causes(data: ImageShards, use: str = "bank") -> dict[str, int]:
    return {cause: sum(files.values()) for cause, files in data.bad_samples()[use].items()}


def forget_indexes(folder: Path) -> None:
    for path in folder.glob("*.index.json"):
        path.unlink()


def add_members(path: Path, *members: tarfile.TarInfo) -> None:
    with tarfile.open(path, "a") as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(bytes(member.size)) if member.isreg() else None)


def member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, target
    return info


def encoded(form: str, size: tuple[int, int] = (30, 20), mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, form, **options)
    return file.getvalue()


def announce(width: int, height: int, form: str) -> bytes:
    """A small image whose header announces another size."""
    image = bytearray(encoded(form))
    if form == "PNG":
        image[16:24] = struct.pack(">II", width, height)
        image[29:33] = struct.pack(">I", zlib.crc32(image[12:29]))
    elif form == "JPEG":
        frame = image.index(b"\xff\xc0")
        image[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    else:
        image[26:30] = struct.pack("<HH", width, height)
    return bytes(image)


# Images.


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_giant_image_is_not_decoded(make_shards, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    extension = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[form]
    folder = make_shards([9], bad={4: {extension: announce(16_000, 16_000, form)}})
    sizes = []

    def decode(image: bytes) -> torch.Tensor:
        sizes.append(pixel_size(image))
        return decode_rgb(image)

    monkeypatch.setattr("ssmpretrain.datamodules.decoding.samples.decode_rgb", decode)
    data = shards(folder)
    assert evaluated(data) == [0, 1, 2, 3, 5, 6, 7, 8]
    assert causes(data) == {"giant images": 1}
    assert set(sizes) == {(12, 12)}
    assert "16,000 x 16,000 pixels" in data.bad_records()[0]["detail"]


def test_the_limit_of_pixels_can_be_set(make_shards) -> None:
    folder = make_shards([6], bad={2: {"jpg": encoded("JPEG", (40, 25)), "cls": b"1"}})
    assert len(evaluated(shards(folder, max_pixels=1000))) == 6
    assert causes_of(shards(folder, max_pixels=999)) == {"giant images": 1}


def causes_of(data: ImageShards) -> dict[str, int]:
    evaluated(data)
    return causes(data)


@pytest.mark.parametrize(
    "image",
    [
        encoded("JPEG", progressive=True),
        encoded("JPEG", mode="L"),
        encoded("JPEG", mode="CMYK", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0"),
        encoded("PNG", mode="P"),
        encoded("PNG", mode="LA"),
        encoded("PNG", mode="I;16"),
        encoded("WEBP"),
        encoded("WEBP", lossless=True),
        encoded("WEBP", mode="RGBA", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0"),
    ],
)
def test_the_size_in_a_header_is_that_of_the_decoded_image_whatever_its_kind(image: bytes) -> None:
    assert pixel_size(image) == (30, 20)
    decoded = decode_rgb(image)
    assert (decoded.shape, decoded.dtype) == ((3, 20, 30), torch.uint8)


def test_a_png_of_16_bits_keeps_its_grey_values() -> None:
    file = io.BytesIO()
    Image.new("I;16", (3, 2), 0x80FF).save(file, "PNG")
    assert decode_rgb(file.getvalue()).unique().tolist() == [0x80]


def test_orientation_in_exif_is_ignored_as_torchvision_and_timm_do() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_rgb(encoded("JPEG", exif=exif)).shape == (3, 20, 30)


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        (b"", "0 bytes"),
        (b"<html>403 Forbidden</html>", "a web page"),
        (encoded("GIF"), "a GIF"),
        (encoded("GIF", save_all=True, append_images=[Image.new("RGB", (30, 20), "red")]), "a GIF"),
        (encoded("BMP"), "begin with 'BM"),
        (encoded("JPEG")[:300], "frame header|truncated"),
        (encoded("JPEG")[:-40], "truncated"),
        (encoded("PNG")[:-40], "decode_png|corrupted"),
        (encoded("PNG")[:20], "begin with '.PNG"),
        (b"\xff\xd8\xff\xe0\x00\x00", "frame header"),
    ],
)
def test_what_is_no_whole_image_is_counted_as_undecodable(make_shards, content: bytes, detail: str) -> None:
    import re

    data = shards(make_shards([6], bad={2: {"jpg": content, "cls": b"1"}}))
    assert evaluated(data) == [0, 1, 3, 4, 5]
    assert causes(data) == {"undecodable images": 1}
    assert re.search(detail, data.bad_records()[0]["detail"])


# Samples.


def test_which_of_several_images_is_read_is_said(make_shards, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_shards([6], bad={number: {"png": encoded("PNG"), "jpg": encoded("JPEG")} for number in (2, 4)})
    data = shards(folder)
    assert len(evaluated(data)) == 6
    assert caplog.messages == [
        "ImageShards: train: 6 samples hold 2 jpg and 6 png: of the images of a sample the first of jpg, jpeg, png, "
        "webp is read."
    ]


def test_a_label_that_is_required_and_missing_is_counted(make_shards) -> None:
    folder = make_shards([6], bad={2: {"png": encoded("PNG")}, 4: {"png": encoded("PNG"), "json": b'{"url": "x"}'}})
    assert len(evaluated(shards(folder))) == 6
    assert causes_of(shards(folder, require_labels=True)) == {"samples without a label": 2}


def test_a_key_used_twice_and_a_field_twice_are_counted(make_shards) -> None:
    folder = make_shards([6])
    path = folder / "train-000000.tar"
    with tarfile.open(path, "a") as tar:
        for name in ("0002.png", "0005.png", "0005.cls", "0005.png"):
            content = encoded("PNG") if name.endswith("png") else b"1"
            tar.addfile(member(name, size=len(content)), io.BytesIO(content))
    for indexed in (True, False):
        write_index(path) if indexed else forget_indexes(folder)
        data = shards(folder)
        assert evaluated(data) == [0, 1, 2, 3, 4, 5]
        assert causes(data) == {"keys used twice": 1, "samples with a field twice": 1}


@pytest.mark.parametrize(
    "odd",
    [
        member("0002.jpg", tarfile.SYMTYPE, target="/etc/passwd"),
        member("0002.jpg", tarfile.LNKTYPE, target="0001.png"),
        member("0002.jpg", tarfile.CHRTYPE),
        member("0002.jpg", tarfile.FIFOTYPE),
    ],
)
@pytest.mark.parametrize("indexed", [True, False])
def test_links_and_devices_are_not_followed_but_counted(make_shards, odd: tarfile.TarInfo, indexed: bool) -> None:
    folder = make_shards([2])
    path = folder / "train-000000.tar"
    add_members(path, odd, member("0002.cls", size=1))
    write_index(path) if indexed else forget_indexes(folder)
    data = shards(folder)
    assert evaluated(data) == [0, 1]
    assert causes(data) == {"links and other special files": 1}


def test_absolute_odd_and_undecodable_names_are_only_names(tmp_path: Path) -> None:
    names = ["/etc/passwd.png", "../../up.png", "a b\nc.png", "ä.png", "x" * 300 + ".png", "raw\udcff.png", "dir/.png"]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{form}.tar"
        with tarfile.open(path, "w", format=form) as tar:
            tar.addfile(member("folder.d", tarfile.DIRTYPE))
            for number, name in enumerate(names):
                content = encoded("PNG") if number != 2 else b"no image"
                tar.addfile(member(name, size=len(content)), io.BytesIO(content))
        data = ImageShards(str(path), **SMALL)
        keys = [key for batch in data.bank_dataloader() for key in batch["key"]]
        assert [key[:6] for key in keys] == ["/etc/p", "../../", "ä", "xxxxxx", "raw\udcff", "dir/"]
        assert causes(data) == {"undecodable images": 1}


def test_a_sparse_file_is_not_blown_up(make_shards) -> None:
    folder = make_shards([3])
    path = folder / "train-000000.tar"
    header = bytearray(member("0003.png", tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"00000000000\0" + b"00000000000\0"  # one piece of nothing
    header[483:495] = b"77777777777\0"  # of 8 GiB
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    path.write_bytes(whole[:end] + bytes(header) + bytes(1024))
    write_index(path)
    data = shards(folder)
    assert evaluated(data) == [0, 1, 2]
    assert causes(data) == {"links and other special files": 1}


def test_no_pickle_is_decoded_and_no_shell_started(
    make_shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touched = tmp_path / "touched"

    class Evil:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {touched}",)

    evil = pickle.dumps(Evil())
    fields = dict.fromkeys(["pyd", "pkl", "pickle", "pt", "pth", "npy", "npz", "ten"], evil)
    folder = make_shards([6], bad={2: {**fields, "png": encoded("PNG")}, 3: fields, 4: {"png": evil, "json": evil}})
    data = shards(folder)
    data.setup("fit")
    assert evaluated(data) == [0, 1, 2, 5]
    for url in (f"pipe:touch {touched}", f"pipe:touch {touched}; cat {folder}/train-000000.tar"):
        with pytest.raises((ValueError, FileNotFoundError)):
            ImageShards(url, **SMALL).setup("fit")
    assert not touched.exists()


def test_webdataset_itself_is_left_as_it_is_for_other_code_and_for_child_processes(tmp_path: Path) -> None:
    assert "WDS_SECURE" not in os.environ and not webdataset.utils.enforce_security
    tar = str(tmp_path / "a.tar")
    with webdataset.TarWriter(tar) as writer:
        writer.write({"__key__": "a", "pyd": {"any": "object"}, "cls": 3})
    for url in (tar, f"pipe:cat {tar}"):
        [sample] = webdataset.WebDataset(url, shardshuffle=False).decode()
        assert sample["pyd"] == {"any": "object"} and sample["cls"] == 3


# Bits.


@pytest.mark.parametrize("where", [2, 130, 600, 1000])  # name, size, pixels, padding or pixels
def test_a_flipped_bit_costs_one_sample(make_shards, where: int) -> None:
    folder = make_shards([9])
    path = folder / "train-000000.tar"
    content = bytearray(path.read_bytes())
    content[int(load_layout(path).offsets[4]) + where] ^= 4
    path.write_bytes(content)
    data = shards(folder)
    assert evaluated(data) == [0, 1, 2, 3, 5, 6, 7, 8]
    assert causes(data) == {"damaged samples": 1}


def test_a_damaged_header_of_a_label_does_not_leave_an_unlabelled_sample(make_shards) -> None:
    folder = make_shards([9])
    path = folder / "train-000000.tar"
    content = bytearray(path.read_bytes())
    content[content.index(b"0004.cls") + 3] ^= 1
    path.write_bytes(content)
    for indexed in (True, False):
        if not indexed:
            forget_indexes(folder)
        data = shards(folder)
        assert evaluated(data) == [0, 1, 2, 3, 5, 6, 7, 8]
        assert causes(data)["damaged samples"] == 1


def test_an_index_of_another_file_of_the_same_size_is_noticed(make_shards) -> None:
    one, other = make_shards([40]) / "train-000000.tar", make_shards([40], prefix="other") / "other-000000.tar"
    content = bytearray(one.read_bytes())
    content[:] = content[512:] + content[:512]
    one.write_bytes(content)
    with pytest.raises(ValueError, match=r"none of 16 samples tried can be used|is usable"):
        shards(one.parent).setup("fit")
    assert other.exists()


# Whole shards, at the start.


def cut(path: Path, samples: float) -> None:
    offsets = [*load_layout(path).offsets.tolist(), path.stat().st_size]
    whole = int(samples)
    end = offsets[whole] + (600 if samples > whole else 0)
    path.write_bytes(path.read_bytes()[:end])


def test_a_truncated_shard_with_an_index_keeps_its_place_in_the_plan(
    make_shards, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_shards([11, 8, 20])
    whole = shards(folder)
    cut(folder / "train-000001.tar", 5.5)
    data = shards(folder)
    data.setup("fit")
    assert data.fingerprint() == whole.fingerprint()
    assert "1 of 3 shards is damaged: train-000001.tar is truncated: 3 of its 8 samples are lost." in caplog.text
    assert evaluated(data) == [number for number in range(39) if number not in (16, 17, 18)]
    assert causes(data) == {"truncated shards": 3}
    assert len(list(data.train_dataloader())) == len(whole.train_dataloader())


@pytest.mark.parametrize("samples", [5, 5.5])
def test_of_a_truncated_shard_without_an_index_the_readable_samples_are_used(
    make_shards, caplog: pytest.LogCaptureFixture, samples: float
) -> None:
    folder = make_shards([11, 8, 20])
    cut(folder / "train-000001.tar", samples)
    forget_indexes(folder)
    data = shards(folder)
    data.setup("fit")
    assert "1 of 3 shards is damaged: train-000001.tar is truncated after sample" in caplog.text
    assert causes(data, "train") == {"truncated shards": 1}
    assert evaluated(data)[:15] == list(range(15))
    assert set(evaluated(data)) >= set(range(19, 39))
    assert not set(evaluated(data)) & {16, 17, 18}


def test_a_sample_cut_off_between_its_fields_is_not_taken_for_an_unlabelled_one(make_shards) -> None:
    path = make_shards([8]) / "train-000000.tar"
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"0005.cls")])
    forget_indexes(path.parent)
    data = shards(path.parent)
    assert evaluated(data) == [0, 1, 2, 3, 4]
    assert [(record["cause"], record["key"]) for record in data.bad_records() if record["split"] == "bank"] == [
        ("truncated shards", "0005")
    ]


def test_samples_after_a_damaged_header_are_found_again_without_an_index(make_shards) -> None:
    folder = make_shards([20])
    path = folder / "train-000000.tar"
    content, offset = bytearray(path.read_bytes()), int(load_layout(path).offsets[5])
    content[offset : offset + 512] = b"\xff" * 512
    path.write_bytes(content)
    forget_indexes(folder)
    assert [number for number in evaluated(shards(folder)) if number not in (4, 5)] == [*range(4), *range(6, 20)]


def test_archives_that_were_joined_end_to_end_are_read_to_the_end(make_shards) -> None:
    folder = make_shards([5, 5])
    path = folder / "train-000000.tar"
    other = folder / "train-000001.tar"
    path.write_bytes(path.read_bytes() + other.read_bytes())
    other.unlink()
    forget_indexes(folder)
    assert evaluated(shards(folder)) == list(range(10))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html><title>403 Forbidden</title>" + b" " * 600, "web page .'403 Forbidden'"),
        (b"\x1f\x8b" + bytes(6000), "compressed with gzip"),
        (b"no tar at all" * 100, "not a tar file"),
        (bytes(10240), "no image"),
    ],
)
@pytest.mark.parametrize("indexed", [True, False])
def test_a_shard_without_a_usable_sample_is_an_error_at_the_start(
    make_shards, content: bytes, message: str, indexed: bool
) -> None:
    folder = make_shards([11, 8, 20])
    (folder / "train-000001.tar").write_bytes(content)
    if not indexed:
        forget_indexes(folder)
    with pytest.raises(ValueError, match=rf"ImageShards: train: .*{message}") as error:
        shards(folder).setup("fit")
    assert "train-000001.tar" in str(error.value)


def test_too_many_lost_samples_stop_the_run_at_once_with_the_list(make_shards) -> None:
    folder = make_shards([40, 40])
    for number in (0, 1):
        cut(folder / f"train-{number:06d}.tar", 20)
    with pytest.raises(ValueError, match=r"2 of 2 shards are damaged: .*000000.*20 of its 40.*000001.*least 40 of 80"):
        shards(folder).setup("fit")
    assert len(evaluated(shards(folder, max_bad_fraction=0.6))) == 40


def test_none_is_tolerated_where_none_is_allowed(make_shards) -> None:
    folder = make_shards([9], bad={4: {"png": b"no"}})
    with pytest.raises(ValueError, match=r"more than 0.00% .* 1 undecodable images"):
        evaluated(shards(folder, max_bad_fraction=0))
    folder = make_shards([9])
    cut(folder / "train-000000.tar", 8)
    forget_indexes(folder)
    with pytest.raises(ValueError, match="1 of 1 shards is damaged"):
        shards(folder, max_bad_fraction=0).setup("fit")


@pytest.mark.parametrize("content", [None, "", "{}", "no json"])
def test_a_shard_with_a_stale_or_broken_index_is_counted_anew(make_shards, content: str | None) -> None:
    folder = make_shards([9])
    path = folder / "train-000000.tar"
    if content is None:
        (make_shards([30], prefix="other") / "other-000000.tar").replace(path)
    else:
        index_path(path).write_text(content)
    data = shards(folder)
    data.setup("fit")
    assert len(evaluated(data)) == (9 if content is not None else 30)
    if content is None:
        assert causes(data, "train") == {"stale indexes": 1}
    else:  # no sample is lost
        assert "train" not in data.bad_samples()


# Whole shards, while they are read.


@pytest.mark.parametrize("indexed", [True, False])
def test_a_shard_that_is_removed_costs_its_samples_once(make_shards, indexed: bool) -> None:
    folder = make_shards([11, 4, 20, 7])
    if not indexed:
        forget_indexes(folder)
    data = shards(folder, num_workers=2)
    data.setup("fit")
    (folder / "train-000001.tar").unlink()
    assert evaluated(data) == [number for number in range(42) if not 11 <= number < 15]
    batches = list(data.train_dataloader())
    assert [len(batch["key"]) for batch in batches] == [4] * 10
    read = Counter(record["sample"] for record in data.bad_records() if record["split"] == "train")
    assert set(read.values()) == {1}
    assert set(causes(data, "train")) == {"missing shards"}


def test_one_lost_shard_of_many_does_not_stop_a_run_and_one_of_four_does(make_shards) -> None:
    folder = make_shards([16] * 80)
    data = shards(folder, max_bad_fraction=0.015)
    data.setup("fit")
    (folder / "train-000066.tar").unlink()
    assert len(evaluated(data)) == 79 * 16
    folder = make_shards([16] * 4, prefix="few")
    data = ImageShards(f"{folder}/few-*.tar", **SMALL)
    data.setup("fit")
    (folder / "few-000002.tar").unlink()
    with pytest.raises(ValueError, match=r"more than 1.00% .*: 11 samples of missing shards in 1 file, .*few-000002"):
        evaluated(data)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_shard_that_is_replaced_is_not_read_where_other_samples_lie(make_shards, indexed: bool) -> None:
    folder = make_shards([11, 8])
    other = make_shards([9], prefix="other") / "other-000000.tar"
    if not indexed:
        forget_indexes(folder)
    data = shards(folder)
    data.setup("fit")
    (folder / "train-000001.tar").write_bytes(other.read_bytes())
    assert evaluated(data) == list(range(11))
    assert causes(data) == {"changed shards": 8}


def test_a_shard_that_is_written_again_with_the_same_contents_is_the_same(make_shards) -> None:
    folder = make_shards([11, 8])
    data = shards(folder)
    data.setup("fit")
    path = folder / "train-000001.tar"
    os.utime(path, ns=(1, 1))
    assert len(evaluated(data)) == 19
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(2, 2))
    assert evaluated(data) == list(range(11))
    assert causes(data) == {"changed shards": 8}


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_an_error_that_may_pass_is_retried_with_a_file_opened_anew(
    make_shards, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    data = shards(make_shards([9]))
    files, waits, closed = [], [], []
    monkeypatch.setattr(reading, "close_local", lambda: closed.append(len(files)))
    read = os.pread

    def fail_twice(file: int, count: int, start: int) -> bytes:
        files.append(file)
        if len(files) in (3, 4):
            raise OSError(number, os.strerror(number))
        return read(file, count, start)

    monkeypatch.setattr(os, "pread", fail_twice)
    monkeypatch.setattr(patience.time, "sleep", waits.append)
    assert evaluated(data) == list(range(9))
    # The last read is of the list of labels that could not be read.
    assert (len(files), len(waits), closed) == (12, 2, [3, 4])
    assert waits == sorted(waits)
    assert causes(data) == {}


def test_an_error_that_does_not_pass_is_counted(make_shards, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_shards([11, 4])
    data = shards(folder)
    data.setup("fit")

    def fail(file: int, count: int, start: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{file}").endswith("000001.tar"):
            raise OSError(errno.EIO, "Input/output error")
        return read(file, count, start)

    read = os.pread
    monkeypatch.setattr(os, "pread", fail)
    monkeypatch.setattr(patience.time, "sleep", lambda seconds: None)
    assert evaluated(data) == list(range(11))
    assert causes(data) == {"unreadable shards": 4}


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: (path.unlink(), path.mkdir())])
def test_a_shard_that_goes_with_its_folder_is_counted(make_shards, harm: Callable[[Path], object]) -> None:
    folder = make_shards([11, 4])
    data = shards(folder, max_bad_fraction=1.0)
    data.setup("fit")
    forget_indexes(folder)
    harm(folder / "train-000001.tar")
    reading.close_local()
    assert evaluated(data) == list(range(11))
    (cause,) = causes(data)
    assert cause in ("missing shards", "unreadable shards")


def failing(monkeypatch: pytest.MonkeyPatch, name: str, number: int, times: int) -> list[float]:
    """Let the first reads of files with a name fail; returns the waits that follow."""
    waits: list[float] = []
    left = [times]
    read = os.pread

    def fail(file: int, count: int, start: int) -> bytes:
        if left[0] and os.readlink(f"/proc/self/fd/{file}").endswith(name):
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return read(file, count, start)

    monkeypatch.setattr(os, "pread", fail)
    monkeypatch.setattr(patience.time, "sleep", waits.append)
    return waits


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_headers_that_cannot_be_read_for_a_moment_are_read_again(
    make_shards, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    folder = make_shards([5, 4])
    forget_indexes(folder)
    waits = failing(monkeypatch, "train-000001.tar", number, 3)
    data = shards(folder)
    data.setup("fit")
    assert (evaluated(data), causes(data), len(waits)) == (list(range(9)), {}, 3)
    assert 0.1 < waits[0] < waits[2]


def test_headers_that_can_no_longer_be_read_are_counted_and_waited_for_once(
    make_shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_shards([5, 4])
    forget_indexes(folder)
    data = shards(folder)
    data.setup("fit")
    monkeypatch.setattr(index, "walk_tar", walk_again)
    waits = failing(monkeypatch, "train-000001.tar", errno.EIO, 10**6)
    assert evaluated(data) == list(range(5))
    assert causes(data) == {"unreadable shards": 4}
    assert len(waits) == patience.PATIENT.attempts - 1


def walk_again(shard: Path) -> Walked:
    """Walk over headers anew, as a process does that has not done so."""
    return tar_walk._walk.__wrapped__(shard, shard.stat().st_size, 0)


def test_a_shard_that_cannot_be_read_at_the_start_is_an_error_that_names_it(
    make_shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_shards([5, 4])
    forget_indexes(folder)
    failing(monkeypatch, "train-000001.tar", errno.EIO, 10**6)
    with pytest.raises(ValueError, match=r"train-000001.tar: Input/output error \(4 attempts\)"):
        shards(folder).setup("fit")


def test_a_file_of_a_folder_is_read_again_and_then_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(encoded("PNG"))
    data = ImageFolder(str(tmp_path), **SMALL)
    data.setup("fit")
    asked: Counter[str] = Counter()
    read = image_folder.read_file

    def fail(path: Path) -> bytes:
        asked[path.name] += 1
        if (path.name == "1.png" and asked[path.name] < 3) or path.name == "2.png":
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(path)

    monkeypatch.setattr(image_folder, "read_file", fail)
    monkeypatch.setattr(patience.time, "sleep", lambda seconds: None)
    assert sum(len(batch["key"]) for batch in data.bank_dataloader()) == 3
    assert causes(data) == {"unreadable files": 1}
    assert asked["1.png"] == 3 and asked["2.png"] == patience.PATIENT.attempts


# Counts.


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_stands_in_for_another_is_counted_once_and_evaluation_apart(make_shards, num_workers: int) -> None:
    bad = {number: {"png": b"no"} for number in range(8, 13)}
    data = shards(make_shards([40], bad=bad), val=None, num_workers=num_workers, shuffle_buffer=1)
    loader = data.train_dataloader()
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        assert sum(len(batch["key"]) for batch in loader) == 40
    assert causes(data, "train") == {"undecodable images": 10}
    list(data.bank_dataloader())
    assert causes(data, "train") == {"undecodable images": 10}
    records = [record for record in data.bad_records() if record["split"] == "train"]
    assert Counter(record["epoch"] for record in records) == {0: 5, 1: 5}
    assert {record["key"] for record in records} == {f"{number:04d}" for number in bad}


def test_a_folder_counts_each_of_its_files(tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(b"no" if number in (2, 3) else encoded("PNG"))
    (tmp_path / "6.jpg").write_bytes(announce(60_000, 60_000, "JPEG"))
    data = ImageFolder(str(tmp_path), **SMALL)
    data.setup("fit")
    assert sum(len(batch["key"]) for batch in data.bank_dataloader()) == 4
    assert causes(data) == {"undecodable images": 2, "giant images": 1}


def test_the_log_names_a_key_that_cannot_be_printed(make_shards, caplog: pytest.LogCaptureFixture) -> None:
    path = make_shards([3]) / "train-000000.tar"
    with tarfile.open(path, "a") as tar:
        tar.addfile(member("a\n\x1b[2Jb\udcff.png", size=2), io.BytesIO(b"no"))
    forget_indexes(path.parent)
    with caplog.at_level(logging.WARNING):
        evaluated(shards(path.parent))
    assert r"skipped a\n\x1b[2Jb\xff in" in caplog.text
