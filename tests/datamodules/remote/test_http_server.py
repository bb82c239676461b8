"""HTTP servers: requests, redirects and invalid headers."""

import io
import time
import urllib.error
import urllib.request
from dataclasses import replace
from http.client import HTTPMessage
from types import SimpleNamespace

import pytest
from fetching import NAME, QUICK, fetch, known

from ssmpretrain.base.errors import DataError, SourceError
from ssmpretrain.datamodules.files.patience import Fault
from ssmpretrain.datamodules.remote import http_server
from ssmpretrain.datamodules.remote.http_redirects import Redirects
from ssmpretrain.datamodules.remote.server import RemoteFile


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


def test_a_source_error_keeps_its_words_on_the_way_out_of_a_worker() -> None:
    text = "Caught SourceError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  x\n"
    assert str(SourceError(f"{text}ssmpretrain.base.errors.SourceError: http://a: gone.\n")) == "http://a: gone."
