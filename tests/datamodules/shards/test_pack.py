import json
import os
import tarfile
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from ssmpretrain.datamodules import ImageTextShards
from ssmpretrain.datamodules.files.image_files import LEAVING, find_images
from ssmpretrain.datamodules.labels.captions import Captions
from ssmpretrain.datamodules.shards.describe import load_index
from ssmpretrain.datamodules.shards.pack import ShardWriter, pack_folder
from ssmpretrain.datamodules.shards.verify import verify_shard
from ssmpretrain.datamodules.tar.walk import walk_tar

OPTIONS = {"prefix": "p", "samples_per_shard": 4, "bytes_per_shard": 1 << 30, "seed": 0}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in ("dog", "cat"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "images" / name / f"{number}.png")
    return tmp_path / "images"


def contents(folder: Path) -> dict[str, bytes]:
    members = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                assert member.name not in members
                members[member.name] = tar.extractfile(member).read()
    return members


def test_bytes_are_kept_and_folders_become_labels(images: Path, tmp_path: Path) -> None:
    shards, left_out = pack_folder(find_images(images, where="x"), tmp_path / "out", **OPTIONS)
    assert [shard.samples for shard in shards] == [4, 4, 2]
    assert left_out == {}
    packed = contents(tmp_path / "out")
    assert len(packed) == 20
    for path in images.rglob("*.png"):
        key = f"{path.parent.name}/{path.stem}"
        assert packed[f"{key}.png"] == path.read_bytes()
        assert packed[f"{key}.cls"] == (b"0" if path.parent.name == "cat" else b"1")
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["cat", "dog"]
    assert not list((tmp_path / "out").glob(".*"))


def test_the_seed_decides_the_order_and_every_byte(images: Path, tmp_path: Path) -> None:
    def pack(name: str, seed: int) -> list[bytes]:
        pack_folder(find_images(images, where="x"), tmp_path / name, **{**OPTIONS, "seed": seed})
        return [path.read_bytes() for path in sorted((tmp_path / name).glob("*.tar"))]

    assert pack("a", 0) == pack("b", 0) != pack("c", 1)


def test_unlabelled_images_get_no_label(images: Path, tmp_path: Path) -> None:
    pack_folder(find_images(images / "cat", where="x"), tmp_path / "out", **OPTIONS)
    assert {name.rpartition(".")[2] for name in contents(tmp_path / "out")} == {"png"}
    assert not (tmp_path / "out" / "classes.json").exists()


def test_names_that_would_share_a_key_or_hide_it_are_kept_apart(images: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for name in ("a.b.png", "a_b.png", "a.png", "a.jpg"):
        (flat / name).write_bytes((images / "cat" / "0.png").read_bytes())
    (flat / "__odd__").mkdir()
    (flat / "__odd__" / "a.png").write_bytes((images / "cat" / "0.png").read_bytes())
    shards, _ = pack_folder(find_images(flat, where="x"), tmp_path / "out", **OPTIONS)
    assert sum(load_index(shard.path).samples for shard in shards) == 5
    assert len(contents(tmp_path / "out")) == 6  # five images, one label


def test_folders_with_dots_are_classes_and_every_reader_groups_their_images(images: Path, tmp_path: Path) -> None:
    """CUB's and Caltech's folders; a key splits at the first dot of its last part alone."""
    names = [
        "001.Black_footed_Albatross/x.png",
        "001.ak47/001_0001.png",
        "a.b/c.d.png",
        "a.b/c.e.png",
        "a.b/v1.0/f.png",
    ]
    names += ["__odd__/__g__.png", "__/h.png", "new.\nline/i.png", "plain/j.png"]
    for name in names:
        (tmp_path / "dots" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "dots" / name).write_bytes((images / "cat" / "0.png").read_bytes())
        (tmp_path / "dots" / name).with_suffix(".txt").write_text(name)
    files = find_images(tmp_path / "dots", where="x")
    shards, _ = pack_folder(files, tmp_path / "out", **{**OPTIONS, "samples_per_shard": 100})
    [path] = [shard.path for shard in shards]
    labels = {name: files.classes.index(name.partition("/")[0]) for name in names}

    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert {sample["txt"].decode(): int(sample["cls"]) for sample in samples} == labels
    keys = {sample["txt"].decode(): sample["__key__"] for sample in samples}
    assert {keys[name] for name in names[:4]} == {
        "001.Black_footed_Albatross/x",
        "001.ak47/001_0001",
        "a.b/c_d",
        "a.b/c_e",
    }

    assert walk_tar(path).extensions == {"png": 9, "txt": 9, "cls": 9} and not walk_tar(path).repeated
    report = verify_shard(path, decode=True, captions=Captions("txt", "x"))
    assert not report.problems and report.samples == 9
    data = ImageTextShards(str(path), batch_size=9, num_workers=0, image_size=8)
    [batch] = data.bank_dataloader()
    assert batch["key"] == [sample["__key__"] for sample in samples]
    assert dict(zip(batch["text"], batch["label"].tolist(), strict=True)) == labels


def test_a_shard_stays_below_its_size(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "p", bytes_per_shard=50_000) as writer:
        for number in range(40):
            writer.write(f"{number}", {"jpg": bytes(4000)})
    assert len(writer.shards) > 1
    assert all(shard.bytes <= 50_000 for shard in writer.shards)
    assert sum(shard.samples for shard in writer.shards) == 40


def test_nothing_is_overwritten(images: Path, tmp_path: Path) -> None:
    files = find_images(images, where="x")
    pack_folder(files, tmp_path / "out", **OPTIONS)
    with pytest.raises(FileExistsError, match=r"already holds"):
        pack_folder(files, tmp_path / "out", **OPTIONS)
    (tmp_path / "out" / "classes.json").unlink()
    with pytest.raises(FileExistsError, match=r"already holds p-000000\.tar; shards are never overwritten"):
        pack_folder(files, tmp_path / "out", **OPTIONS)


def test_an_interrupted_shard_is_not_left_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, "p", samples_per_shard=2) as writer:
        for number in range(5):
            if number == 3:
                raise KeyboardInterrupt
            writer.write(f"{number}", {"jpg": b"x"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p-000000.index.json", "p-000000.tar"]


def test_unreadable_images_are_left_out_with_the_reason(images: Path, tmp_path: Path) -> None:
    (images / "cat" / "empty.jpg").touch()
    (images / "cat" / "gone.jpg").symlink_to(tmp_path / "missing.jpg")
    shards, left_out = pack_folder(find_images(images, where="x"), tmp_path / "out", **OPTIONS)
    assert sum(shard.samples for shard in shards) == 10
    assert left_out == {"0 bytes": ["cat/empty.jpg"], "No such file or directory": ["cat/gone.jpg"]}


def test_captions_beside_images_are_packed_along_unless_they_are_not_wanted(images: Path, tmp_path: Path) -> None:
    (images / "cat" / "0.txt").write_bytes("a cat 🐈".encode())
    (images / "cat" / "0.json").write_bytes(b'{"caption": "one"}')
    (images / "dog" / "1.txt").write_bytes(b"\xff is not ours to judge")
    (images / "dog" / "no image.txt").write_bytes(b"of no image")
    shards, left_out = pack_folder(find_images(images, where="x"), tmp_path / "out", **OPTIONS)
    packed = contents(tmp_path / "out")
    assert left_out == {} and sum(shard.samples for shard in shards) == 10
    assert {name for name in packed if not name.endswith((".png", ".cls"))} == {"cat/0.txt", "cat/0.json", "dog/1.txt"}
    assert packed["cat/0.txt"].decode() == "a cat 🐈" and packed["dog/1.txt"].startswith(b"\xff")
    pack_folder(find_images(images, where="x"), tmp_path / "images only", **OPTIONS, captions=False)
    assert all(name.endswith((".png", ".cls")) for name in contents(tmp_path / "images only"))


def test_an_image_whose_caption_cannot_be_read_is_left_out(images: Path, tmp_path: Path) -> None:
    (images / "cat" / "0.txt").symlink_to("/proc/self/mem")  # a file that nobody can read from its start
    shards, left_out = pack_folder(find_images(images, where="x"), tmp_path / "out", **OPTIONS)
    assert sum(shard.samples for shard in shards) == 9
    assert left_out == {"Input/output error": ["cat/0.png"]}


def test_links_out_of_the_folder_are_packed_only_when_followed(images: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    (secret / "bird").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(secret / "bird" / "0.png")
    (secret / "key.txt").write_text("secret")
    (images / "cat" / "link.png").symlink_to(secret / "bird" / "0.png")
    (images / "cat" / "0.txt").symlink_to("../../secret/key.txt")
    (images / "bird").symlink_to(secret / "bird")
    (images / "dog" / "again.png").symlink_to("../cat/1.png")  # within the folder
    shards, left_out = pack_folder(find_images(images, where="x", follow_links=False), tmp_path / "out", **OPTIONS)
    assert sum(shard.samples for shard in shards) == 11
    assert {reason: sorted(paths) for reason, paths in left_out.items()} == {
        LEAVING: ["bird", "cat/0.txt", "cat/link.png"]
    }
    packed = contents(tmp_path / "out")
    assert "dog/again.png" in packed and not {"cat/link.png", "cat/0.txt", "bird/0.png"} & set(packed)
    shards, left_out = pack_folder(find_images(images, where="x"), tmp_path / "followed", **OPTIONS)
    assert (sum(shard.samples for shard in shards), left_out) == (13, {})
    assert contents(tmp_path / "followed")["cat/0.txt"] == b"secret"


def test_a_caption_that_is_no_file_is_said(images: Path, tmp_path: Path) -> None:
    os.mkfifo(images / "cat" / "0.txt")
    (images / "cat" / "1.txt").symlink_to("gone.txt")
    (images / "cat" / "2.json").mkdir()  # a folder is nobody's caption
    shards, left_out = pack_folder(find_images(images, where="x"), tmp_path / "out", **OPTIONS)
    assert sum(shard.samples for shard in shards) == 8
    assert left_out == {"Not a regular file": ["cat/0.png"], "No such file or directory": ["cat/1.png"]}


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        ShardWriter(tmp_path / "file" / "out", "p")
