"""Disk space of the cache: its limit holds, and the least recently used shards leave first."""

import fcntl
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from faulty_server import serve
from fetching import NAME, fetch, known, shard

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules.remote.cache import ShardCache, make_cache
from ssmpretrain.datamodules.remote.cache_locks import locked
from ssmpretrain.datamodules.remote.download import Download
from ssmpretrain.datamodules.remote.server import RemoteFile


@pytest.fixture
def cache(cache: ShardCache) -> ShardCache:
    """The cache, with time for a server on a busy machine: no test here waits for a timeout."""
    return replace(cache, patience=replace(cache.patience, timeout=20.0, window=20.0))


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


def test_the_default_limit_leaves_half_of_the_disk(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SSMPRETRAIN_CACHE", str(tmp_path))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 8 << 30})())
    cache = make_cache("x")
    assert (cache.folder, cache.max_bytes) == (tmp_path / "shards", 4 << 30)
    assert make_cache("x", limit="2G").max_bytes == 2 << 30
    with pytest.raises(DataError, match="x: cache_limit: a size is a positive number"):
        make_cache("x", limit="much")


@pytest.mark.parametrize("fault", ["chunked", "endless", "truncate:9999999"])
def test_the_limit_binds_where_the_size_is_not_known(site, folder, cache, fault) -> None:
    content = (folder / NAME).read_bytes()
    site.faults[NAME] = [fault]
    with pytest.raises(DataError, match=rf"{NAME}: has .* or more; the cache .* may hold .*\. Raise cache_limit"):
        fetch(replace(cache, max_bytes=len(content) - 1000), shard(site))
    assert not [path for path in cache.folder.iterdir() if path.name.endswith((".tar", ".partial"))]


@pytest.mark.parametrize("fault", ["always:chunked", "always:endless"])
def test_the_limit_binds_for_several_at_once_whose_size_is_not_known(
    make_shards, tmp_path: Path, cache, fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
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
            with locked(cache.disk_space.lock, fcntl.LOCK_EX):  # so that no shard leaves or comes meanwhile
                for path in cache.folder.glob("*tar*"):
                    with suppress(FileNotFoundError):  # renamed meanwhile
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
    # A shard that a thread has just fetched may still be open, so that it cannot leave: then the cache says so.
    in_use = "more than its limit, all of it in use" in caplog.text
    assert 0 < peak[0] <= (2 if in_use else 1) * most
    if fault == "always:chunked":
        assert found == [str((folder / name).stat().st_size) for name in names]
    else:
        assert all("or more; the cache" in text for text in found), found


def test_others_leave_for_a_shard_whose_size_is_not_known(site, folder, cache) -> None:
    files = [known(site, folder, number) for number in range(3)]
    cache = replace(cache, max_bytes=int(2.5 * max(file.bytes for file in files)))
    for number, file in enumerate(files[:2]):
        fetch(cache, file)
        os.utime(next(cache.folder.glob(f"*{file.name}.lock")), (number, number))
    site.faults["train-000002.tar"] = ["chunked"]
    fetch(cache, shard(site, 2))
    assert cached(cache) == ["train-000001.tar", "train-000002.tar"]
