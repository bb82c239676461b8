"""Copies in the cache: shared by processes, and dropped when they are damaged."""

import fcntl
import os
import re
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fetching import NAME, fetch, known, shard

from ssmpretrain.base.errors import DataError, SourceError
from ssmpretrain.datamodules import image_shards
from ssmpretrain.datamodules.faults.bad_samples import BadSample
from ssmpretrain.datamodules.remote import cache as cache_module
from ssmpretrain.datamodules.remote.cache import ShardCache, _entry_name, make_cache
from ssmpretrain.datamodules.remote.cache_locks import locked
from ssmpretrain.datamodules.remote.server import RemoteFile
from ssmpretrain.datamodules.shards import open_tar as open_tars
from ssmpretrain.datamodules.shards import shard as one_shard
from ssmpretrain.datamodules.shards.location import RemoteShard
from ssmpretrain.datamodules.shards.open_tar import open_tar
from ssmpretrain.datamodules.shards.verify import verify_shard
from ssmpretrain.datamodules.tar.index import checksum, index_path, write_index


def test_what_failed_is_not_asked_for_again_at_once_by_any_process_of_the_run(site, folder, cache) -> None:
    site.faults[NAME] = ["always:503"]
    for _ in range(3):
        with pytest.raises(SourceError, match="503"):
            fetch(cache, known(site, folder))
    assert site.requests[f"GET {NAME}"] == 4
    site.faults.clear()
    another_run = replace(cache, run="another")
    assert fetch(another_run, known(site, folder)) == (folder / NAME).read_bytes()


def fetch_all(arguments: tuple[ShardCache, list[RemoteFile]]) -> list[int]:
    cache, files = arguments
    return [len(fetch(cache, file)) for file in files]


def test_processes_that_want_one_shard_fetch_it_once(site, folder, cache) -> None:
    import multiprocessing

    files = [known(site, folder, number) for number in range(4)]
    site.faults["train-000001.tar"] = ["reset:4000"]
    with multiprocessing.get_context("fork").Pool(3) as pool:
        sizes = pool.map(fetch_all, [(cache, files)] * 3)
    assert sizes == [[file.bytes for file in files]] * 3
    assert sum(site.sent.values()) == sum(file.bytes for file in files)


def test_two_files_of_one_name_are_kept_apart(site, folder, cache) -> None:
    first = known(site, folder)
    before = fetch(cache, first)
    (folder / NAME).write_bytes((folder / "train-000001.tar").read_bytes())
    assert fetch(cache, known(site, folder)) == (folder / NAME).read_bytes() != before
    assert fetch(cache, first) == before
    unknown = RemoteFile(f"{site.url}/{NAME}?part=2")
    assert _entry_name(unknown) != _entry_name(shard(site))


def test_who_waits_for_a_lock_that_is_removed_meanwhile_takes_the_new_one(cache) -> None:
    path = cache.folder / "a.lock"
    same: list[bool] = []

    def wait() -> None:
        with locked(path, fcntl.LOCK_SH) as lock:
            same.append(path.exists() and os.fstat(lock).st_ino == path.stat().st_ino)

    thread = threading.Thread(target=wait)
    with locked(path, fcntl.LOCK_EX):
        thread.start()
        time.sleep(0.1)
        path.unlink()
    thread.join()
    assert same == [True]


def test_a_folder_that_cannot_be_written_is_an_error_in_words(tmp_path: Path, monkeypatch) -> None:
    def denied(*args):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file cannot be written \(File exists\)\. Choose another folder"):
        make_cache("x", str(tmp_path / "file"))
    monkeypatch.setattr("ssmpretrain.datamodules.remote.cache_locks.os.open", denied)
    with pytest.raises(DataError, match=r"cannot be written \(Permission denied\)\. Choose another folder: the arg"):
        make_cache("x", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", ["folder", "self-link", "dangling link"])
@pytest.mark.parametrize("ending", ["", ".lock", ".index.json", ".0.partial", "whole"])
def test_a_folder_or_link_in_the_place_of_a_file_of_the_cache_heals(
    site, folder, cache, kind: str, ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = replace(known(site, folder), bytes=-1, sha256="")
    entry = cache.folder / _entry_name(file)
    if ending == "whole":  # one that is fetched, of which the copy alone is replaced
        fetch(cache, file)
        entry.unlink()
        ending = ""
    path = index_path(entry) if ending == ".index.json" else entry.with_name(entry.name + ending)
    if kind == "folder":
        path.mkdir()
        (path / "x").write_text("x")
    else:
        path.symlink_to(path if kind == "self-link" else cache.folder / "gone")
    cache.disk_space.used()
    assert fetch(cache, file) == (folder / NAME).read_bytes() == fetch(cache, file)
    assert entry.is_file() and not entry.is_symlink() and not (cache.folder / "gone").exists()
    if ending == ".lock":
        assert f"{path}: is a link or a folder where the cache keeps a file" in caplog.text


def empty(path: Path) -> None:
    path.write_bytes(b"")


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + bytes(512))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(b'"bytes": ') + 9] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("known_before", [True, False])
@pytest.mark.parametrize(
    ("pattern", "harm", "said"),
    [
        ("*.tar", empty, "has 0 bytes; .* were fetched"),
        ("*.tar", halve, "has .* bytes; .* were fetched"),
        ("*.tar", grow, "has .* bytes; .* were fetched"),
        ("*.index.json", empty, "has an index that is not an index of version 1"),
        ("*.index.json", halve, "has an index that is not an index"),
        ("*.index.json", flip, "has an index that (is damaged|says|does not say)"),
        ("*.index.json", Path.unlink, r"has no index that can be read \(No such file"),
        ("*.lock", lambda path: path.write_bytes(b'{"run": 5, "time": []'), ""),
    ],
)
def test_a_copy_that_was_damaged_is_dropped_and_fetched_anew(
    site, folder, cache, caplog, pattern, harm, said, known_before
) -> None:
    file = known(site, folder) if known_before else shard(site)
    content = fetch(cache, file)
    (path,) = (path for path in cache.folder.glob(pattern) if not path.name.startswith("."))
    harm(path)
    assert fetch(cache, file) == content == (folder / NAME).read_bytes()
    assert fetch(cache, file) == content
    assert site.requests[f"GET {NAME}"] == 1 + bool(said)
    if said:
        assert re.search(rf"{cache.folder}/\w+-{NAME}: this copy of {site.url}/{NAME} {said}", caplog.text)


def test_who_comes_while_others_read_does_not_wait_for_them(site, folder, cache) -> None:
    file = known(site, folder)
    with cache.hold(file) as path:
        assert cache._fetch(file, path) is False  # as one that saw no copy a moment ago
        assert fetch(cache, file) == (folder / NAME).read_bytes()
        path.unlink()  # by hand; its lock file stays, and we have it
        began = time.monotonic()
        assert fetch(cache, file) == (folder / NAME).read_bytes()
        assert time.monotonic() - began < 10
    assert site.requests[f"GET {NAME}"] == 2


def test_a_cache_that_somebody_removes_is_made_anew(site, folder, cache) -> None:
    content = fetch(cache, known(site, folder))
    shutil.rmtree(cache.folder)
    assert fetch(cache, known(site, folder)) == content


def test_a_copy_that_is_damaged_again_and_again_is_an_error_that_names_it(site, folder, cache, monkeypatch) -> None:
    def write(path: Path, *args: Any, **kwargs: Any) -> None:
        write_index(path, *args, **kwargs)
        os.truncate(path, 1000)

    monkeypatch.setattr(cache_module, "write_index", write)
    with pytest.raises(SourceError, match=rf"its copy {cache.folder}/.* is damaged as soon as it is written") as error:
        fetch(cache, known(site, folder))
    assert error.value.cause == "damaged shards"
    assert site.requests[f"GET {NAME}"] == 3


def read_all_of(arguments: tuple[ShardCache, str]) -> list[str]:
    """Return the keys of a shard, read through the batches of training."""
    cache, url = arguments
    data = image_shards.ImageShards(url, batch_size=1, image_size=8, cache=str(cache.folder), cache_limit="1G")
    batches = data._batches("train", train=False, limit=None)
    return [batches.read(0, sample)["__key__"] for sample in range(12)]


@pytest.mark.parametrize("number", [2, 600, 9000, -20_000])
def test_a_flipped_bit_of_a_copy_is_found_and_processes_that_find_it_fetch_it_once(
    site, folder, cache, number, caplog
) -> None:
    import multiprocessing

    expected = read_all_of((cache, f"{site.url}/{NAME}"))
    path = next(cache.folder.glob("*.tar"))
    content = bytearray(path.read_bytes())
    content[number] ^= 4
    path.write_bytes(content)  # in place: also this process, which holds it, reads the damage
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert pool.map(read_all_of, [(cache, f"{site.url}/{NAME}")] * 6) == [expected] * 6
    assert read_all_of((cache, f"{site.url}/{NAME}")) == expected
    assert site.requests[f"GET {NAME}"] == 2
    assert next(cache.folder.glob("*.tar")).read_bytes() == (folder / NAME).read_bytes()


def test_a_shard_stays_open_while_it_is_read_though_others_are_opened(site, folder, cache) -> None:
    paths = [RemoteShard(known(site, folder, number), cache, 12) for number in range(4)]
    tar = open_tar(paths[0])
    open_tars._open_remote.cache_clear()  # as by other threads that open many
    for path in paths[1:]:
        open_tar(path)
    assert os.pread(tar.fileno(), 1 << 20, 0) == (folder / NAME).read_bytes()


def test_verifying_looks_at_every_byte_of_a_copy(site, folder, cache) -> None:
    path = RemoteShard(known(site, folder), cache, 12)
    fetch(cache, path.file)
    copy = next(cache.folder.glob("*.tar"))
    copy.write_bytes(copy.read_bytes()[:-5000] + b"x" + bytes(4999))
    assert verify_shard(path, decode=False).problems == []
    assert copy.read_bytes() == (folder / NAME).read_bytes()


def test_a_copy_whose_samples_are_damaged_as_they_were_fetched_is_looked_at_once(
    site, folder, cache, monkeypatch
) -> None:
    def damaged(*args: object, **kwargs: object) -> None:
        raise BadSample("damaged samples", "as they lie on the server")

    looked: list[int] = []
    monkeypatch.setattr(one_shard, "read_sample", damaged)
    monkeypatch.setattr(cache_module, "sha256_of", lambda file: looked.append(file) or checksum(folder / NAME))
    for _ in range(3):
        with pytest.raises(BadSample, match="as they lie on the server"):
            read_all_of((cache, f"{site.url}/{NAME}"))
    assert (site.requests[f"GET {NAME}"], len(looked)) == (1, 1)


def test_a_full_disk_is_an_error_in_words(site, folder, cache, monkeypatch) -> None:
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ssmpretrain.datamodules.remote.cache.os.replace", full)
    with pytest.raises(DataError, match=r"No space left on device\)\. Make room, or lower cache_limit") as error:
        fetch(cache, known(site, folder))
    assert not isinstance(error.value, SourceError)
