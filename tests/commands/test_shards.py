import argparse
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from faulty_server import serve
from PIL import Image

from ssmpretrain.cli import main
from ssmpretrain.commands import shards
from ssmpretrain.datamodules.shards.pack import ShardWriter


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    shards.add_arguments(parser)
    return shards.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(6):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "images" / name / f"{number}.png")
    return tmp_path / "images"


@pytest.fixture
def packed(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert run("pack", images, tmp_path / "out", "--samples-per-shard", 5) == 0
    capsys.readouterr()
    return tmp_path / "out"


def test_pack_tells_what_it_made_as_a_recipe_names_it(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("pack", images, tmp_path / "out", "--samples-per-shard", 5, "--prefix", "train") == 0
    out = capsys.readouterr().out
    assert "packed 12 images, 2 classes, into 3 shards" in out
    assert f"{tmp_path}/out/train-{{000000..000002}}.tar" in out
    assert run("verify", f"{tmp_path}/out/train-{{000000..000002}}.tar") == 0


def test_pack_says_that_one_reader_refuses_images_of_two_kinds(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("pack", images, tmp_path / "one") == 0
    assert "load_dataset" not in capsys.readouterr().out
    Image.new("RGB", (8, 8)).save(images / "cat" / "another.jpeg")
    assert run("pack", images, tmp_path / "two") == 0
    assert "of 2 kinds (jpg, png): Hugging Face's load_dataset refuses" in capsys.readouterr().out


def test_pack_reports_what_it_left_out(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "cat" / "empty.jpg").touch()
    assert run("pack", images, tmp_path / "out") == 2
    assert "left out 1: 0 bytes: cat/empty.jpg" in capsys.readouterr().out


def test_pack_says_which_links_it_did_not_follow(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "mine.png")
    (images / "cat" / "up").symlink_to(images)
    assert run("pack", images, tmp_path / "out") == 0
    assert "left out 1: folders that are read already, or hold this one: cat/up" in capsys.readouterr().out
    for number in range(5):
        (images / "dog" / f"link {number}.png").symlink_to(tmp_path / "mine.png")
    assert run("pack", images, tmp_path / "fewer") == 2
    out = capsys.readouterr().out
    assert "packed 12 images" in out
    assert "left out 5: links that leave the folder, which --follow-links would follow: dog/link 0.png, " in out
    assert run("pack", images, tmp_path / "all", "--follow-links") == 0
    assert "packed 17 images" in capsys.readouterr().out
    (tmp_path / "farm").mkdir()
    (tmp_path / "farm" / "a.png").symlink_to(tmp_path / "mine.png")
    with pytest.raises(ValueError, match=r"holds no files; left out 1: links that leave .* --follow-links"):
        run("pack", tmp_path / "farm", tmp_path / "none")


def test_names_do_not_reach_the_terminal_raw_and_need_not_be_utf_8(
    images: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    names = [b"cat/\x1b]0;owned\x07\r.jpg", b"cat/caf\xe9.jpg", "cat/\u202egnp.jpg".encode()]
    for name in names:
        Path(os.fsdecode(bytes(images) + b"/" + name)).write_bytes(b"no image")
    assert run("pack", images, tmp_path / "out") == 0
    assert run("verify", tmp_path / "out") == 2
    out = capsysbinary.readouterr().out.decode()
    assert "3  undecodable images: " in out and "verified 1 shards, 15 samples: problems: 3" in out
    for shown in ("cat/\\x1b]0;owned\\x07\\r ", "cat/caf\\xe9 ", "cat/\\u202egnp "):
        assert shown in out
    assert out.replace("\n", "").isprintable()
    Path(os.fsdecode(bytes(images) + b"/cat/empty \xe9\x1b.jpg")).touch()
    assert run("pack", images, tmp_path / "left") == 2
    assert "left out 1: 0 bytes: cat/empty \\xe9\\x1b.jpg\n" in capsysbinary.readouterr().out.decode()


def test_pack_counts_the_captions_that_lie_beside_images(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        (images / "cat" / f"{number}.txt").write_text("a cat")
    assert run("pack", images, tmp_path / "out") == 0
    assert "packed 12 images, 2 classes, 3 .txt captions, into 1 shards" in capsys.readouterr().out
    assert run("pack", images, tmp_path / "none", "--no-captions") == 0
    assert "packed 12 images, 2 classes, into 1 shards" in capsys.readouterr().out


def test_verify_finds_captions_that_cannot_be_used_if_asked(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {"cat/0": b"a cat", "cat/1": b" ", "cat/2": "café".encode("latin-1"), "dog/0": "собака".encode("utf-16")}
    for name, text in texts.items():
        (images / f"{name}.txt").write_bytes(text)
    (images / "dog/1.json").write_text('{"caption": ["a dog", 5]}')
    (images / "dog/2.json").write_text('{"caption": ')
    run("pack", images, tmp_path / "out")
    capsys.readouterr()
    assert run("verify", tmp_path / "out") == 0
    assert "all good" in capsys.readouterr().out
    assert run("verify", tmp_path / "out", "--caption", "txt", "--caption", "json.caption", "--fast") == 2
    out = capsys.readouterr().out
    assert "       6  samples without a caption: " in out
    assert "       2  captions that are not UTF-8: " in out and "cat/2 (txt: byte 3 is 0xe9)" in out
    assert "       1  empty captions: shard-000000.tar: cat/1 (txt)" in out
    assert "       2  bad captions: " in out and "dog/1 (json.caption: expected a string; got 5)" in out
    assert "problems: 11" in out
    with pytest.raises(ValueError, match=r"shards verify: caption is an extension, json\.FIELD"):
        run("verify", tmp_path / "out", "--caption", "")


def test_pack_takes_the_classes_of_another_set_and_says_which_have_no_image(
    images: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = json.loads((packed / "classes.json").read_text())
    (tmp_path / "names.txt").write_text("\n".join(["emu", *reversed(names)]))
    assert run("pack", images, tmp_path / "again", "--classes", tmp_path / "names.txt") == 0
    assert "classes with no image: 1 of 3: emu\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "again" / "classes.json").read_text()) == ["emu", *reversed(names)]
    for number, listed in enumerate((packed / "classes.json", packed)):
        assert run("pack", images, tmp_path / f"third{number}", "--classes", listed) == 0
    assert "no image" not in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"nothing\.txt: cannot be read"):
        run("pack", images, tmp_path / "fourth", "--classes", tmp_path / "nothing.txt")


def test_pack_refuses_a_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shards pack: no image"):
        run("pack", tmp_path, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="shards pack: no folder"):
        run("pack", tmp_path / "missing", tmp_path / "out")


def test_verify_says_which_of_several_images_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    with ShardWriter(tmp_path, "p") as writer:
        for key in ("a", "b"):
            writer.write(key, {"png": image.getvalue(), "webp": image.getvalue()})
    assert run("verify", tmp_path) == 0
    out = capsys.readouterr().out
    assert (
        "note: 2 samples hold 2 png and 2 webp: of the images of a sample the first of jpg, jpeg, png, webp is" in out
    )


def test_a_message_does_not_reach_the_terminal_raw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "verify", f"{tmp_path}/\x1b[31m\x9bmissing.tar"]) == 2
    message = capsys.readouterr().err
    assert "\\x1b[31m\\x9bmissing.tar" in message and message.strip().isprintable()


@pytest.mark.parametrize(("text", "size"), [("1G", 1 << 30), ("500MB", 500 << 20), ("1.5k", 1536), ("42", 42)])
def test_sizes_have_units(text: str, size: int) -> None:
    assert shards.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "0", "1X"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="a size is a positive number"):
        shards.parse_size(text)


def test_verify_of_good_shards_says_so(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", packed) == run("verify", packed, "--fast") == 0
    assert "verified 3 shards, 12 samples: all good" in capsys.readouterr().out


def test_verify_finds_images_that_do_not_decode_unless_fast(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "cat" / "broken.jpg").write_bytes(b"no image")
    run("pack", images, tmp_path / "out")
    assert run("verify", tmp_path / "out", "--fast") == 0
    assert run("verify", tmp_path / "out") == 2
    assert "1  undecodable images: shard-000000.tar: cat/broken" in capsys.readouterr().out


def test_verify_finds_a_flipped_bit(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = packed / "shard-000001.tar"
    content = bytearray(shard.read_bytes())
    content[540] ^= 1  # inside the first image
    shard.write_bytes(content)
    assert run("verify", packed, "--fast") == 2
    assert "indexes that describe other contents: shard-000001.index.json" in capsys.readouterr().out


@pytest.mark.parametrize("samples", ["4", "-5", "true"])
def test_verify_finds_a_folder_index_that_says_something_else(
    packed: Path, samples: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (packed / "index.json").read_text()
    (packed / "index.json").write_text(text.replace('"samples": 5', f'"samples": {samples}', 1))
    assert run("verify", packed, "--fast") == 2
    assert "1  indexes that describe other contents: index.json: shard-000000.tar" in capsys.readouterr().out


def test_verify_finds_truncation_and_repeated_keys(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (packed / "copy.tar").write_bytes((packed / "shard-000000.tar").read_bytes())
    cut = packed / "shard-000001.tar"
    cut.write_bytes(cut.read_bytes()[:3000])
    assert run("verify", packed) == 2
    out = capsys.readouterr().out
    assert "5  keys used twice" in out
    assert "1  damaged shards or indexes" in out
    assert "1 without an index" in out


def test_index_makes_shards_whole_again(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (packed / "shard-000000.index.json").unlink()
    assert run("index", packed) == 0
    assert "indexed 3 shards, 12 samples" in capsys.readouterr().out
    assert run("verify", packed) == 0
    assert "without an index" not in capsys.readouterr().out


def test_packing_needs_neither_lightning_nor_a_trainer(images: Path, tmp_path: Path) -> None:
    program = (
        "import argparse, sys; from ssmpretrain.commands import shards; p = argparse.ArgumentParser();"
        "shards.add_arguments(p); assert not {'torch', 'webdataset'} & set(sys.modules);"
        f"shards.run(p.parse_args(['pack', {str(images)!r}, {str(tmp_path / 'out')!r}]));"
        "assert 'lightning' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_index_describes_the_folder_in_one_file(packed: Path) -> None:
    (packed / "index.json").unlink()
    assert run("index", packed) == 0
    assert set(json.loads((packed / "index.json").read_text())["shards"]) == {f"shard-{n:06d}.tar" for n in range(3)}


def test_index_of_shards_on_a_server_is_refused() -> None:
    with pytest.raises(ValueError, match=r"writes beside local shards; got https://host/a.tar"):
        run("index", "https://host/a.tar")


def test_shards_on_a_server_are_verified(packed: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("SSMPRETRAIN_CACHE", str(tmp_path / "cache"))
    with serve(packed) as site:
        assert run("verify", site.url) == 0
        assert "verified 3 shards, 12 samples: all good" in capsys.readouterr().out
        site.faults["shard-000001.tar"] = ["always:404"]
        shutil.rmtree(tmp_path / "cache")
        assert run("verify", f"{site.url}/shard-{{000000..000002}}.tar") == 2
        assert "damaged shards or indexes: http" in capsys.readouterr().out


def test_verify_names_the_sample_whose_bits_flipped_and_reads_on(
    packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = packed / "shard-000001.tar"
    content = bytearray(shard.read_bytes())
    content[540] ^= 1  # inside the first image
    content[-11000] ^= 1
    shard.write_bytes(content)
    assert run("verify", packed, "--fast") == 2
    out = capsys.readouterr().out
    assert "2  damaged samples: shard-000001.tar: " in out
    assert "its bytes are not those that were indexed" in out


def test_verify_finds_links_giant_images_and_missing_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    giant = bytearray(image.getvalue())
    giant[16:24] = struct.pack(">II", 20_000, 20_000)
    fields = [("a.png", image.getvalue()), ("a.cls", b"1"), ("b.png", bytes(giant)), ("b.cls", b"1")]
    fields += [("c.png", image.getvalue()), ("e.png", image.getvalue()), ("e.cls", b"1")]
    with tarfile.open(tmp_path / "odd.tar", "w") as tar:
        for name, content in fields:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("f.png")
        link.type, link.linkname = tarfile.SYMTYPE, "a.png"
        tar.addfile(link)
    assert run("verify", tmp_path) == 2
    out = capsys.readouterr().out
    assert "1  giant images: odd.tar: b (20,000 x 20,000 pixels)" in out
    assert "1  samples without a label where most have one: odd.tar: c" in out
    assert "1  links and other special files: odd.tar: f (f.png is a link)" in out
