"""Shards fetched over HTTP from a server that fails, into a cache that is shared, limited and told what to expect."""

import fcntl
import io
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.client import HTTPMessage
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from faulty_server import FaultySite, serve

from ssmpretrain.base.errors import DataError, SourceError
from ssmpretrain.datamodules import image_shards
from ssmpretrain.datamodules.faults.bad_samples import BadSample
from ssmpretrain.datamodules.files.patience import Fault, Patience
from ssmpretrain.datamodules.remote import cache as cache_module
from ssmpretrain.datamodules.remote import http_server
from ssmpretrain.datamodules.remote.cache import ShardCache, _entry_name, make_cache
from ssmpretrain.datamodules.remote.cache_locks import locked
from ssmpretrain.datamodules.remote.download import Download
from ssmpretrain.datamodules.remote.http_redirects import Redirects
from ssmpretrain.datamodules.remote.server import RemoteFile
from ssmpretrain.datamodules.shards import open_tar as open_tars
from ssmpretrain.datamodules.shards import shard as one_shard
from ssmpretrain.datamodules.shards.location import RemoteShard
from ssmpretrain.datamodules.shards.open_tar import open_tar
from ssmpretrain.datamodules.shards.verify import verify_shard
from ssmpretrain.datamodules.tar.index import checksum, index_path, write_index

QUICK = Patience(attempts=4, first_wait=0.01, longest_wait=0.2, timeout=0.5, window=0.4, least_bytes=1000)


@pytest.fixture
def folder(make_shards) -> Path:
    return make_shards([12, 12, 12, 12])


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory) -> ShardCache:
    return ShardCache(tmp_path_factory.mktemp("cache"), 1 << 30, patience=QUICK)


def shard(site: FaultySite, number: int = 0, **known) -> RemoteFile:
    return RemoteFile(f"{site.url}/train-{number:06d}.tar", **known)


def known(site: FaultySite, folder: Path, number: int = 0) -> RemoteFile:
    path = folder / f"train-{number:06d}.tar"
    return shard(site, number, bytes=path.stat().st_size, sha256=checksum(path))


def fetch(cache: ShardCache, file: RemoteFile) -> bytes:
    with cache.hold(file) as path:
        return path.read_bytes()


NAME = "train-000000.tar"


@pytest.mark.parametrize(
    ("faults", "requests"),
    [
        ([], 1),
        (["reset:5000", "reset:5000"], 3),
        (["503", "500"], 3),
        (["429"], 2),
        (["hang"], 2),
        (["drip"], 2),
        (["truncate:3000"], 2),
        (["length:+10"], 2),
        (["length:-512"], 2),
        (["page"], 2),
        (["header"], 2),
        (["chunk"], 2),
        (["endless"], 2),
        (["chunked"], 1),
    ],
)
def test_a_fault_that_passes_leaves_the_right_bytes(site, folder, cache, faults, requests) -> None:
    site.faults[NAME] = list(faults)
    content = (folder / NAME).read_bytes()
    assert fetch(cache, known(site, folder)) == content
    assert site.requests[f"GET {NAME}"] == requests
    assert fetch(cache, known(site, folder)) == content
    assert site.requests[f"GET {NAME}"] == requests, "the second time it is there"


@pytest.mark.parametrize("fault", ["reset:5000", "truncate:5000", "drip"])
def test_a_broken_transfer_goes_on_where_it_broke(site, folder, cache, fault) -> None:
    site.faults[NAME] = [fault]
    fetch(cache, known(site, folder))
    assert 0 <= site.sent[NAME] - (folder / NAME).stat().st_size <= 5 * (fault == "drip")  # sent, and not received


def test_a_shard_that_is_rewritten_between_two_attempts_is_read_from_its_beginning(site, folder, cache) -> None:
    content = (folder / NAME).read_bytes()
    site.faults[NAME] = ["reset:5000"]
    assert fetch(cache, shard(site, bytes=len(content), version='"of the attempt before"')) == content
    assert [sent["If-Range"] for sent in site.headers] == [None, '"of the attempt before"']
    assert site.sent[NAME] == 5000 + len(content)


def test_no_connection_stays_open_that_a_fork_would_share(site, folder, cache) -> None:
    site.faults[NAME] = ["reset:5000"]
    fetch(cache, known(site, folder))
    assert [sent["Connection"] for sent in site.headers] == ["close", "close"]


def test_a_proxy_of_the_environment_is_asked(site, folder, cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", site.url)
    monkeypatch.delenv("no_proxy", raising=False)
    file = replace(known(site, folder), url=f"http://host.invalid/{NAME}")
    assert fetch(cache, file) == (folder / NAME).read_bytes()
    assert [sent["Host"] for sent in site.headers] == ["host.invalid"]


def test_a_server_without_ranges_sends_the_whole_again(site, folder, cache) -> None:
    site.ranges = False
    site.faults[NAME] = ["reset:5000"]
    assert fetch(cache, known(site, folder)) == (folder / NAME).read_bytes()
    assert site.sent[NAME] == 5000 + (folder / NAME).stat().st_size


@pytest.mark.parametrize(
    ("fault", "cause", "requests", "said"),
    [
        ("404", "missing shards", 1, "the server says 404 Not Found."),
        ("403", "refused shards", 1, "403 Forbidden: check the address"),
        ("503", "unreachable shards", 4, r"503 Service Unavailable \(4 attempts\)"),
        ("reset:0", "unreachable shards", 4, r"the connection .* \(4 attempts\)"),
        ("hang", "stalled shards", 4, "does not answer"),
        ("page", "damaged shards", 3, "a web page instead of the file"),
        ("length:+10", "changed shards", 2, "bytes; .* are expected"),
        ("header", "stalled shards", 4, "does not answer"),
        ("chunk", "stalled shards", 4, "does not answer"),
        ("endless", "changed shards", 2, "the server sent more than the expected"),
        ("redirect:http://[::1/a", "refused shards", 1, "its address or a header is not valid"),
        (f"redirect:{NAME}", "refused shards", 5, "redirects in a circle"),
        ("redirect:http://localhost:1/a.tar", "refused shards", 1, 'set storage_options {redirects: \\["localhost:1"'),
    ],
)
def test_a_fault_that_stays_is_an_error_with_its_cause(site, folder, cache, fault, cause, requests, said) -> None:
    site.faults[NAME] = [f"always:{fault}"]
    with pytest.raises(SourceError, match=f"^{site.url}/{NAME}: .*{said}") as error:
        fetch(cache, known(site, folder))
    assert error.value.cause == cause
    assert site.requests[f"GET {NAME}"] == requests


def test_a_slow_drip_that_stays_is_stalled(site, folder, cache) -> None:
    site.faults[NAME] = ["always:drip"]
    cache = replace(cache, patience=replace(QUICK, attempts=2, window=0.2))
    with pytest.raises(SourceError, match=r"only \d+ bytes came in") as error:
        fetch(cache, known(site, folder))
    assert error.value.cause == "stalled shards"


def test_what_failed_is_not_asked_for_again_at_once_by_any_process_of_the_run(site, folder, cache) -> None:
    site.faults[NAME] = ["always:503"]
    for _ in range(3):
        with pytest.raises(SourceError, match="503"):
            fetch(cache, known(site, folder))
    assert site.requests[f"GET {NAME}"] == 4
    site.faults.clear()
    another_run = replace(cache, run="another")
    assert fetch(another_run, known(site, folder)) == (folder / NAME).read_bytes()


def test_a_server_that_is_not_there_is_unreachable(folder, cache) -> None:
    with pytest.raises(SourceError, match=r"refused.*4 attempts") as error:
        fetch(cache, RemoteFile("http://127.0.0.1:1/a.tar", bytes=10))
    assert error.value.cause == "unreachable shards"


def test_a_shard_rewritten_on_the_server_is_not_taken_for_the_one_that_was_planned(site, folder, cache) -> None:
    expected = known(site, folder)
    content = bytearray((folder / NAME).read_bytes())
    content[600] ^= 1
    (folder / NAME).write_bytes(content)
    with pytest.raises(SourceError, match="its checksum is not the one in its index") as error:
        fetch(cache, expected)
    assert error.value.cause == "changed shards"
    (folder / NAME).write_bytes(content + bytes(512))
    with pytest.raises(SourceError, match=r"bytes; .* are expected: it was rewritten"):
        fetch(replace(cache, run="next"), expected)


def test_a_new_version_of_the_same_size_is_said_to_be_one(site, folder, cache, caplog) -> None:
    size = (folder / NAME).stat().st_size
    fetch(cache, shard(site, bytes=size, version='"old"'))
    assert "changed on the server since it was indexed" in caplog.text


def test_a_damaged_tar_of_unknown_contents_is_found_out(site, folder, cache) -> None:
    content = (folder / NAME).read_bytes()
    (folder / NAME).write_bytes(content[: len(content) // 2])
    with pytest.raises(SourceError, match="truncated after sample") as error:
        fetch(cache, shard(site))
    assert error.value.cause == "damaged shards"
    assert site.requests[f"GET {NAME}"] == 2


def test_a_transfer_that_a_killed_process_left_is_continued(site, folder, cache) -> None:
    code = (
        "import sys; from pathlib import Path; from ssmpretrain.datamodules.remote.cache import ShardCache\n"
        "from ssmpretrain.datamodules.remote.server import RemoteFile\n"
        "with ShardCache(Path(sys.argv[1]), 1 << 30).hold(RemoteFile(sys.argv[2], int(sys.argv[3]), sys.argv[4])): pass"
    )
    file = known(site, folder)
    site.faults[NAME] = ["drip"]
    arguments = [str(cache.folder), file.url, str(file.bytes), file.sha256]
    process = subprocess.Popen([sys.executable, "-c", code, *arguments])
    while site.sent[NAME] < 20:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    partial = next(cache.folder.glob("*.partial"))
    partial.write_bytes((folder / NAME).read_bytes()[:5000])  # what it would have flushed
    site.sent.clear()
    assert fetch(cache, file) == (folder / NAME).read_bytes()
    assert site.sent[NAME] <= file.bytes - 5000 + 20  # a dripping answer under way may still count


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


@contextmanager
def limited(cache: ShardCache, files: list[RemoteFile], shards: float) -> Iterator[ShardCache]:
    yield replace(cache, max_bytes=int(shards * max(file.bytes for file in files)))


def cached(cache: ShardCache) -> list[str]:
    return sorted(path.name.partition("-")[2] for path in cache.folder.glob("*.tar"))


def test_the_least_recently_used_leave_and_no_more_than_needed(site, folder, cache) -> None:
    files = [known(site, folder, number) for number in range(4)]
    cache = replace(cache, max_bytes=int(3.2 * max(file.bytes for file in files)))
    for number, file in enumerate(files[:3]):
        fetch(cache, file)
        os.utime(next(cache.folder.glob(f"*{file.name}.lock")), (number, number))
    fetch(cache, files[0])  # used again: the second is now the oldest
    fetch(cache, files[3])
    assert cached(cache) == ["train-000000.tar", "train-000002.tar", "train-000003.tar"]


def test_a_shard_that_is_read_stays_and_the_excess_is_said(site, folder, cache, caplog) -> None:
    files = [known(site, folder, number) for number in range(3)]
    cache = replace(cache, max_bytes=int(1.5 * max(file.bytes for file in files)))
    with cache.hold(files[0]) as path:
        fetch(cache, files[1])
        assert path.exists()
        assert "more than its limit, all of it in use" in caplog.text
    fetch(cache, files[2])
    assert cached(cache) == ["train-000002.tar"]


def test_a_limit_below_one_shard_is_an_error(site, folder, cache) -> None:
    with pytest.raises(DataError, match=r"train-000000.tar: has .* may hold 100 B\. Raise cache_limit"):
        fetch(replace(cache, max_bytes=100), known(site, folder))


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


def test_a_transfer_that_goes_further_at_each_attempt_is_not_given_up(site, folder, cache) -> None:
    site.faults[NAME] = ["reset:2000"] * 10
    with pytest.raises(SourceError, match="4 attempts"):
        fetch(replace(cache, patience=replace(QUICK, least_bytes=100_000)), known(site, folder))
    assert fetch(replace(cache, run="next"), known(site, folder)) == (folder / NAME).read_bytes()
    assert site.faults[NAME] == []


def test_the_pause_that_a_server_asks_for_is_kept(site, folder, cache) -> None:
    site.faults[NAME] = ["429:1"]
    began = time.monotonic()
    fetch(replace(cache, patience=replace(QUICK, longest_wait=0.5)), known(site, folder))
    assert time.monotonic() - began >= 0.5


def test_a_header_does_not_follow_a_redirect_to_another_host(site, folder, cache, caplog) -> None:
    elsewhere = site.url.replace("127.0.0.1", "localhost")
    site.faults["moved.tar"] = [f"redirect:{elsewhere}/{NAME}"]
    headers = {"Authorization": "Bearer x", "X-Key": "secret"}
    options = {"headers": headers, "redirects": [elsewhere.removeprefix("http://")]}
    assert fetch(replace(cache, options=options), RemoteFile(f"{site.url}/moved.tar")) == (folder / NAME).read_bytes()
    assert [(sent["Authorization"], sent["X-Key"]) for sent in site.headers] == [("Bearer x", "secret"), (None, None)]
    assert f"127.0.0.1:{site.url.rpartition(':')[2]} redirects to {options['redirects'][0]}, which" in caplog.text


def test_a_header_follows_a_redirect_on_one_host_and_port(site, folder, cache) -> None:
    site.faults["moved.tar"] = [f"redirect:/elsewhere/{NAME}"]
    options = {"headers": {"Authorization": "Bearer x"}}
    assert fetch(replace(cache, options=options), RemoteFile(f"{site.url}/moved.tar")) == (folder / NAME).read_bytes()
    assert site.authorizations == ["Bearer x", "Bearer x"]


@pytest.mark.parametrize(
    ("before", "after", "followed"),
    [
        ("http://a.org/x", "http://a.org/y", True),
        ("http://a.org/x", "https://a.org/x", True),
        ("https://a.org/x", "https://a.org:443/y", True),
        ("https://a.org/x", "https://a.org:8443/y", False),
        ("http://a.org/x", "https://a.org:8443/y", False),
        ("https://a.org/x", "https://b.org/y", False),
        ("https://a.org/x", "http://a.org/y", False),
        ("https://a.org/x", "https://cdn.c.org/y", True),
        ("https://a.org/x", "https://c.org/y", False),
        ("https://a.org/x", "https://evilc.org/y", False),
        ("https://a.org/x", "http://cdn.c.org/y", False),
        ("https://huggingface.co/datasets/o/n/resolve/main/a.tar", "https://cdn-lfs-us-1.hf.co/x?signature=1", True),
        ("https://huggingface.co/datasets/o/n/resolve/main/a.tar", "https://cas-bridge.xethub.hf.co/x", True),
        ("https://huggingface.co/a.tar", "https://evilhf.co/x", False),
        ("https://b.s3.amazonaws.com/a.tar", "https://b.s3.eu-west-1.amazonaws.com/a.tar", True),
        ("http://a.org/x", "http://127.0.0.1:6379/", False),
    ],
)
def test_redirects_lead_where_they_are_known_or_allowed_to(before: str, after: str, followed: bool) -> None:
    request = urllib.request.Request(before)
    request.add_unredirected_header("Authorization", "Bearer x")
    asked = (request, io.BytesIO(), 302, "Found", HTTPMessage(), after)
    if not followed:
        with pytest.raises(Fault, match="the server redirects") as fault:
            Redirects(["*.c.org"]).redirect_request(*asked)
        assert (fault.value.cause, fault.value.attempts) == ("refused shards", 1)
        return
    new = Redirects(["*.c.org"]).redirect_request(*asked)
    same_host = before.split("/")[2].split(":")[0] == after.split("/")[2].split(":")[0]
    assert new is not None and new.full_url == after
    assert new.has_header("Authorization") == same_host


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"anon": True}, "http takes headers and redirects; got anon"),
        ({"headers": {"X": 5}}, "headers has texts by name"),
        ({"headers": "X: 5"}, "headers has texts by name"),
        ({"redirects": "a.org"}, "redirects is a list of hosts; got 'a.org'"),
        ({"redirects": [5]}, "redirects is a list of hosts"),
    ],
)
def test_options_of_another_kind_are_refused(site, folder, cache, options, said) -> None:
    with pytest.raises(DataError, match=said):
        fetch(replace(cache, options=options), known(site, folder))


def test_a_password_is_sent_and_not_shown(site, folder, cache) -> None:
    site.faults["train-000001.tar"] = ["always:403"]
    url = site.url.replace("http://", "http://me:secret@")
    fetch(cache, RemoteFile(f"{url}/{NAME}?signature=abc"))
    assert site.authorizations[-1] == "Basic bWU6c2VjcmV0"
    with pytest.raises(SourceError) as error:
        fetch(cache, RemoteFile(f"{url}/train-000001.tar?signature=abc"))
    assert "secret" not in str(error.value) and "abc" not in str(error.value)


def test_headers_are_sent(site, folder, cache) -> None:
    fetch(replace(cache, options={"headers": {"Authorization": "Bearer x"}}), known(site, folder))
    assert site.authorizations[-1] == "Bearer x"


def test_the_default_limit_leaves_half_of_the_disk(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SSMPRETRAIN_CACHE", str(tmp_path))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 8 << 30})())
    cache = make_cache("x")
    assert (cache.folder, cache.max_bytes) == (tmp_path / "shards", 4 << 30)
    assert make_cache("x", limit="2G").max_bytes == 2 << 30
    with pytest.raises(DataError, match="x: cache_limit: a size is a positive number"):
        make_cache("x", limit="much")


def test_a_folder_that_cannot_be_written_is_an_error_in_words(tmp_path: Path, monkeypatch) -> None:
    def denied(*args):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file cannot be written \(File exists\)\. Choose another folder"):
        make_cache("x", str(tmp_path / "file"))
    monkeypatch.setattr("ssmpretrain.datamodules.remote.cache_locks.os.open", denied)
    with pytest.raises(DataError, match=r"cannot be written \(Permission denied\)\. Choose another folder: the arg"):
        make_cache("x", str(tmp_path / "cache"))


@pytest.mark.parametrize("fault", ["chunked", "endless", "truncate:9999999"])
def test_the_limit_binds_where_the_size_is_not_known(site, folder, cache, fault) -> None:
    content = (folder / NAME).read_bytes()
    site.faults[NAME] = [fault]
    with pytest.raises(DataError, match=rf"{NAME}: has .* or more; the cache .* may hold .*\. Raise cache_limit"):
        fetch(replace(cache, max_bytes=len(content) - 1000), shard(site))
    assert not [path for path in cache.folder.iterdir() if path.name.endswith((".tar", ".partial"))]


@pytest.mark.parametrize("fault", ["always:chunked", "always:endless"])
def test_the_limit_binds_for_several_at_once_whose_size_is_not_known(
    make_shards, tmp_path: Path, cache, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_shards([40] * 6)
    names = sorted(path.name for path in folder.glob("*.tar"))
    most = int(1.5 * (folder / NAME).stat().st_size)
    peak, received = [0], Download._receive

    def receive(self: Download, server: Any) -> None:
        expect = self._expect

        def measured(size: int) -> None:
            expect(size)
            now = 0
            for path in cache.folder.glob("*tar*"):
                with suppress(FileNotFoundError):  # dropped meanwhile
                    now += path.stat().st_size if path.suffix in (".tar", ".partial") else 0
            peak[0] = max(peak[0], now)

        self._expect = measured  # type: ignore[method-assign]
        received(self, server)

    def attempt(number: int) -> str:
        try:
            return str(len(fetch(replace(cache, max_bytes=most), shard(site, number))))
        except DataError as error:
            return str(error)

    monkeypatch.setattr(Download, "_receive", receive)
    with serve(folder) as site, ThreadPoolExecutor(6) as pool:
        site.faults.update({name: [fault] for name in names})
        found = list(pool.map(attempt, range(6)))
    assert 0 < peak[0] <= most
    if fault == "always:chunked":
        assert found == [str((folder / name).stat().st_size) for name in names]
    else:
        assert all("or more; the cache" in text for text in found), found


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
    cache.room.used()
    assert fetch(cache, file) == (folder / NAME).read_bytes() == fetch(cache, file)
    assert entry.is_file() and not entry.is_symlink() and not (cache.folder / "gone").exists()
    if ending == ".lock":
        assert f"{path}: is a link or a folder where the cache keeps a file" in caplog.text


def test_others_leave_for_a_shard_whose_size_is_not_known(site, folder, cache) -> None:
    files = [known(site, folder, number) for number in range(3)]
    cache = replace(cache, max_bytes=int(2.5 * max(file.bytes for file in files)))
    for number, file in enumerate(files[:2]):
        fetch(cache, file)
        os.utime(next(cache.folder.glob(f"*{file.name}.lock")), (number, number))
    site.faults["train-000002.tar"] = ["chunked"]
    fetch(cache, shard(site, 2))
    assert cached(cache) == ["train-000001.tar", "train-000002.tar"]


def test_what_arrived_before_a_failure_is_kept_only_where_it_can_be_checked(site, folder, cache) -> None:
    size = (folder / NAME).stat().st_size
    for file, kept in ((known(site, folder), 1), (shard(site, bytes=size), 0)):
        site.faults[NAME] = ["always:truncate:5000"]
        with pytest.raises(SourceError, match="the server sent"):
            fetch(replace(cache, patience=replace(QUICK, least_bytes=1 << 20)), file)
        assert len(list(cache.folder.glob("*.partial"))) == kept
        for path in cache.folder.iterdir():
            path.unlink()


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
    """The keys of a shard, read as training does."""
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


@pytest.mark.parametrize(
    ("headers", "size", "wait"),
    [
        ({"Content-Length": "9" * 5000}, -1, 0),
        ({"Content-Length": "-5"}, -1, 0),
        ({"Content-Length": "\u0665"}, -1, 0),
        ({"Retry-After": "-5"}, -1, 0),
        ({"Retry-After": "Mon, 01 Jan 0001 00:00:00 -0000"}, -1, 0),
        ({"Retry-After": "9" * 400}, -1, float("inf")),
    ],
)
def test_headers_that_cannot_be_say_nothing(headers: dict[str, str], size: int, wait: float) -> None:
    message = HTTPMessage()
    for name, value in headers.items():
        message[name] = value
    response = SimpleNamespace(status=200, headers=message)
    assert http_server._file("http://a/b.tar", response).bytes == size
    fault = http_server._status_fault(urllib.error.HTTPError("http://a", 503, "No\x1b[2J" + "x" * 999, message, None))
    assert fault.wait == wait
    assert str(fault).startswith(r"the server says 503 No\x1b[2Jxx") and len(str(fault)) == 500


def test_a_copy_whose_samples_are_damaged_as_they_were_fetched_is_looked_at_once(
    site, folder, cache, monkeypatch
) -> None:
    def damaged(*args: object, **kwargs: object) -> None:
        raise BadSample("damaged samples", "as they lie on the server")

    looked: list[int] = []
    monkeypatch.setattr(one_shard, "parse_sample", damaged)
    monkeypatch.setattr(cache_module, "checksum_of", lambda file: looked.append(file) or checksum(folder / NAME))
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


def test_a_source_error_keeps_its_words_on_the_way_out_of_a_worker() -> None:
    text = "Caught SourceError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  x\n"
    assert str(SourceError(f"{text}ssmpretrain.base.errors.SourceError: http://a: gone.\n")) == "http://a: gone."
