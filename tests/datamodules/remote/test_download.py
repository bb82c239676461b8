"""Downloads from servers that fail, stall, lie or rewrite files."""

import subprocess
import sys
import time
from dataclasses import replace

import pytest
from fetching import NAME, QUICK, fetch, known, shard

from ssmpretrain.base.errors import SourceError
from ssmpretrain.datamodules.remote.server import RemoteFile


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


def test_a_transfer_that_goes_further_at_each_attempt_is_not_given_up(site, folder, cache) -> None:
    site.faults[NAME] = ["reset:2000"] * 10
    with pytest.raises(SourceError, match="4 attempts"):
        fetch(replace(cache, patience=replace(QUICK, least_bytes=100_000)), known(site, folder))
    assert fetch(replace(cache, run="next"), known(site, folder)) == (folder / NAME).read_bytes()
    assert site.faults[NAME] == []


def test_what_arrived_before_a_failure_is_kept_only_where_it_can_be_checked(site, folder, cache) -> None:
    size = (folder / NAME).stat().st_size
    for file, kept in ((known(site, folder), 1), (shard(site, bytes=size), 0)):
        site.faults[NAME] = ["always:truncate:5000"]
        with pytest.raises(SourceError, match="the server sent"):
            fetch(replace(cache, patience=replace(QUICK, least_bytes=1 << 20)), file)
        assert len(list(cache.folder.glob("*.partial"))) == kept
        for path in cache.folder.iterdir():
            path.unlink()
