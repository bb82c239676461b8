"""Damaged and unusual samples: the fields that are read, and the counts."""

import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset
from damaged import SMALL, add_members, causes, causes_of, encoded, evaluated, forget_indexes, member, shards

from ssmpretrain.datamodules import ImageShards
from ssmpretrain.datamodules.tar.index import locate_samples, write_index


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


@pytest.mark.parametrize("where", [2, 130, 600, 1000])  # name, size, pixels, padding or pixels
def test_a_flipped_bit_costs_one_sample(make_shards, where: int) -> None:
    folder = make_shards([9])
    path = folder / "train-000000.tar"
    content = bytearray(path.read_bytes())
    content[int(locate_samples(path).offsets[4]) + where] ^= 4
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
