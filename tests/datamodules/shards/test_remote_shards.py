"""Shards on a web server and in an S3-compatible store: found, described, read; both servers run on loopback."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ssmpretrain.base.errors import DataError, SourceError
from ssmpretrain.datamodules.files.patience import Fault, Patience
from ssmpretrain.datamodules.remote.cache import ShardCache, make_cache
from ssmpretrain.datamodules.remote.http_server import HttpServer
from ssmpretrain.datamodules.shards import folder_index, remote_index, remote_paths
from ssmpretrain.datamodules.shards.describe import load_index, load_indexes
from ssmpretrain.datamodules.shards.fetch_ahead import fetch_ahead
from ssmpretrain.datamodules.shards.folder_index import write_folder_indexes
from ssmpretrain.datamodules.shards.open_tar import _open_remote, open_tar
from ssmpretrain.datamodules.shards.paths import find_shards
from ssmpretrain.datamodules.shards.shard import Shard
from ssmpretrain.datamodules.tar.index import ShardIndex

BRACES = "train-{000000..000003}.tar"
Find = Callable[[str], list[ShardIndex]]


@pytest.fixture
def folder(make_shards) -> Path:
    return make_shards([5, 6, 7, 8])


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory) -> ShardCache:
    return ShardCache(tmp_path_factory.mktemp("cache"), 1 << 30)


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch):
    """Yield a client of an empty store; the environment points s3:// URLs to this store."""
    import urllib.request

    import boto3

    urllib.request.urlopen(urllib.request.Request(f"{s3_endpoint}/moto-api/reset", method="POST")).close()
    for name, value in {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/nonexistent",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="shards")
    return client


def upload(s3, folder: Path, **options: str) -> None:
    for path in sorted(folder.iterdir()):
        if path.is_file():
            s3.put_object(Bucket="shards", Key=f"a/{path.name}", Body=path.read_bytes(), **options)


def keys(index: ShardIndex) -> list[str]:
    return [Shard(index).read_sample(number)["__key__"] for number in range(index.samples)]


def index_folder(folder: Path) -> None:
    write_folder_indexes([load_index(path) for path in sorted(folder.glob("*.tar"))])


def load(pattern: str, cache: ShardCache) -> list[ShardIndex]:
    return load_indexes(find_shards(pattern, where="x", cache=cache))


def test_one_request_describes_a_folder_that_has_an_index(site, folder, cache) -> None:
    index_folder(folder)
    indexes = load(f"{site.url}/{BRACES}", cache)
    assert [index.samples for index in indexes] == [5, 6, 7, 8]
    assert site.requests == {"GET index.json": 1}
    assert str(indexes[0].path) == f"{site.url}/train-000000.tar"
    assert [key for index in indexes for key in keys(index)] == [f"{number:04d}" for number in range(26)]
    assert {count for name, count in site.requests.items() if name.endswith(".tar")} == {1}
    reread = load(f"{site.url}/{BRACES}", replace(cache, run="next"))
    assert keys(reread[1]) == keys(indexes[1])
    assert site.requests["GET train-000001.tar"] == 1


@pytest.mark.parametrize("fault", ["cut:100", "reset:100", "503"])
def test_half_an_index_is_asked_for_again(site, folder, cache, fault) -> None:
    index_folder(folder)
    site.faults["index.json"] = [fault]
    assert [index.samples for index in load(f"{site.url}/{BRACES}", cache)] == [5, 6, 7, 8]
    assert site.requests == {"GET index.json": 2}


def test_the_index_beside_each_shard_is_enough_and_its_offsets_are_not_fetched(site, folder, cache) -> None:
    indexes = load(f"{site.url}/{BRACES}", cache)
    assert [index.samples for index in indexes] == [5, 6, 7, 8]
    assert [index.sha256 for index in indexes] == [load_index(path).sha256 for path in sorted(folder.glob("*.tar"))]
    assert not any(name.endswith(".tar") for name in site.requests)
    assert keys(indexes[3])[-1] == "0025"


@pytest.mark.parametrize("name", ["sizes.json", "_info.json"])
def test_numbers_of_samples_by_timm_and_open_clip_are_read(site, folder, cache, name) -> None:
    names = [f"train-{number:06d}.tar" for number in range(4)]
    counts = dict(zip(names, [5, 6, 7, 8], strict=True))
    split = {"name": "train", "num_samples": 26, "filenames": names, "shard_lengths": list(counts.values())}
    for path in folder.glob("*.index.json"):
        path.unlink()
    (folder / name).write_text(json.dumps(counts if name == "sizes.json" else {"splits": {"train": split}}))
    for indexes in (load(f"{site.url}/{BRACES}", cache), load(f"{folder}/{BRACES}", cache)):
        assert [(index.samples, index.images) for index in indexes] == [(5, 5), (6, 6), (7, 7), (8, 8)]
        assert keys(indexes[1])[0] == "0005"
    assert site.requests["GET train-000000.tar"] == 0


def test_a_wrong_number_of_samples_is_found_when_the_shard_is_read(site, folder, cache) -> None:
    for path in folder.glob("*.index.json"):
        path.unlink()
    (folder / "sizes.json").write_text(json.dumps({f"train-{number:06d}.tar": 9 for number in range(4)}))
    index = load(f"{site.url}/{BRACES}", cache)[0]
    with pytest.raises(SourceError, match="holds 5 samples; 9 are expected") as error:
        open_tar(index.path)
    assert error.value.cause == "changed shards"


def test_a_shard_of_which_nothing_is_known_is_fetched_and_counted_once(site, folder, cache, caplog) -> None:
    for path in folder.glob("*.index.json"):
        path.unlink()
    assert [index.samples for index in load(f"{site.url}/{BRACES}", cache)] == [5, 6, 7, 8]
    assert "has no index and is fetched" in caplog.text
    for path in cache.folder.glob("*.tar"):
        path.unlink()  # what is known of it stays when it has left
    assert [index.samples for index in load(f"{site.url}/{BRACES}", cache)] == [5, 6, 7, 8]
    assert site.requests["GET train-000000.tar"] == 1


def test_pages_in_the_place_of_indexes_are_not_taken_for_them(site, folder, cache) -> None:
    for name in ("index.json", "_info.json", "sizes.json"):
        site.faults[name] = ["always:page"]
    site.faults["train-000002.index.json"] = ["always:page"]
    assert [index.samples for index in load(f"{site.url}/{BRACES}", cache)] == [5, 6, 7, 8]


def test_an_index_that_cannot_be_is_not_believed_and_every_sample_is_planned(site, folder, cache, caplog) -> None:
    index_folder(folder)
    for name, field in (("index.json", '"samples": 5,'), ("train-000000.index.json", '"samples": 5,')):
        text = (folder / name).read_text()
        assert field in text
        (folder / name).write_text(text.replace(field, '"samples": -180,'))
    for pattern in (f"{site.url}/{BRACES}", site.url):
        assert [index.samples for index in load(pattern, cache)] == [5, 6, 7, 8]
    assert f"{site.url}/index.json: is ignored for 1 of its 4 shards: of 'train-000000.tar' it says -180" in caplog.text


@pytest.mark.parametrize("number", [0, -4, 10**30, True, 4.0])
def test_numbers_of_samples_that_cannot_be_are_not_believed(site, folder, cache, number) -> None:
    for path in folder.glob("*.index.json"):
        path.unlink()
    names = [f"train-{number:06d}.tar" for number in range(4)]
    (folder / "sizes.json").write_text(json.dumps(dict.fromkeys(names, number)))
    assert [index.samples for index in load(f"{site.url}/{BRACES}", cache)] == [5, 6, 7, 8]


@pytest.mark.parametrize("fault", ["endless", "page"])
def test_an_index_without_end_is_passed_over_and_said(site, folder, cache, fault, caplog, monkeypatch) -> None:
    for module in (folder_index, remote_paths):
        monkeypatch.setattr(module, "MOST_INDEX", 1 << 20)
    monkeypatch.setattr(remote_index._Folder._read, "__defaults__", ("", 1 << 20))
    index_folder(folder)
    site.faults["index.json"] = [f"always:{fault}"]
    assert [index.samples for index in load(f"{site.url}/{BRACES}", cache)] == [5, 6, 7, 8]
    assert ("index.json: is ignored: it has 1 MiB or more" in caplog.text) == (fault == "endless")
    with pytest.raises(DataError, match=r"a web server does not list its files.*has no index.json"):
        load(site.url, cache)
    assert site.sent["index.json"] < 30 << 20


def test_an_index_that_comes_too_slowly_is_not_waited_for(site, folder, cache, monkeypatch) -> None:
    index_folder(folder)
    server = HttpServer({}, Patience(attempts=1, window=0.05, least_bytes=0))
    site.faults["index.json"] = ["drip"]
    with pytest.raises(Fault, match=r"it had not ended after \d+ bytes and 0 s"):
        server.head(f"{site.url}/index.json", 1 << 20)


@pytest.mark.parametrize("name", ["../up.tar", "a/b.tar", "a\x1b[2J.tar"])
def test_an_index_that_names_files_elsewhere_is_refused(site, folder, cache, name) -> None:
    index_folder(folder)
    said = json.loads((folder / "index.json").read_text())
    said["shards"][name] = said["shards"]["train-000000.tar"]
    (folder / "index.json").write_text(json.dumps(said))
    with pytest.raises(DataError, match=r"index.json names files of its folder; got '"):
        find_shards(site.url, where="x", cache=cache)


def test_an_index_in_the_cache_that_was_damaged_is_made_anew(site, folder, cache) -> None:
    for path in folder.glob("*.index.json"):
        path.unlink()
    assert [index.samples for index in load(f"{site.url}/{BRACES}", cache)] == [5, 6, 7, 8]
    for path in cache.folder.glob("*.index.json"):
        path.write_bytes(path.read_bytes()[:-40])
    for path in list(cache.folder.glob("*.tar"))[:2]:
        path.unlink()
    assert [index.samples for index in load(f"{site.url}/{BRACES}", cache)] == [5, 6, 7, 8]


def test_a_run_over_copies_with_flipped_bits_yields_the_right_batches(site, folder, tmp_path, caplog) -> None:
    import torch

    from ssmpretrain.datamodules import ImageShards

    index_folder(folder)
    options = {"batch_size": 4, "num_workers": 0, "image_size": 32, "cache": str(tmp_path / "cache")}
    first = list(ImageShards(f"{site.url}/{BRACES}", **options).train_dataloader())
    _open_remote.cache_clear()
    for number, path in enumerate(sorted((tmp_path / "cache").glob("*.tar"))):
        content = bytearray(path.read_bytes())
        content[700 + 512 * number] ^= 1
        path.write_bytes(content)
    images = ImageShards(f"{site.url}/{BRACES}", **options)
    again = list(images.train_dataloader())
    assert all(torch.equal(one["image"], other["image"]) for one, other in zip(first, again, strict=True))
    assert images.bad_samples()["train"] == {}
    assert "is not as it was fetched (by its checksum); it is dropped and fetched again" in caplog.text


def test_missing_shards_are_counted_and_named(site, folder, cache) -> None:
    with pytest.raises(FileNotFoundError, match=r"2 of the 6 shards are missing: train-000004.tar, train-000005.tar\."):
        load(f"{site.url}/train-{{000000..000005}}.tar", cache)
    with pytest.raises(FileNotFoundError, match="1 of the 1 shards"):
        load(f"{site.url}/b.tar", cache)


def test_a_web_server_lists_what_its_index_names(site, folder, cache) -> None:
    for pattern in (site.url, f"{site.url}/train-*.tar"):
        with pytest.raises(DataError, match=r"a web server does not list its files.*Name the shards in braces"):
            find_shards(pattern, where="x", cache=cache)
    index_folder(folder)
    names = [f"train-{number:06d}.tar" for number in range(4)]
    for pattern in (site.url, f"{site.url}/", f"{site.url}/train-*.tar"):
        assert [shard.name for shard in find_shards(pattern, where="x", cache=cache)] == names
    with pytest.raises(FileNotFoundError, match=r"0 files match .*/val-\*.tar; the folder holds 4 files"):
        find_shards(f"{site.url}/val-*.tar", where="x", cache=cache)


def test_a_server_that_refuses_everything_is_named_within_seconds(cache) -> None:
    began = time.monotonic()
    with pytest.raises(SourceError, match=r"http://127.0.0.1:1/index.json: the connection failed .*\(4 attempts\)"):
        load(f"http://127.0.0.1:1/{BRACES}", cache)
    assert time.monotonic() - began < 10


def test_shards_in_s3_are_listed_described_and_read(s3, folder, cache) -> None:
    upload(s3, folder)
    for pattern in ("s3://shards/a", "s3://shards/a/", "s3://shards/a/train-*.tar", f"s3://shards/a/{BRACES}"):
        indexes = load(pattern, cache)
        assert [(index.path.name, index.samples) for index in indexes] == [
            (f"train-{number:06d}.tar", 5 + number) for number in range(4)
        ]
    assert [key for index in indexes for key in keys(index)] == [f"{number:04d}" for number in range(26)]


def test_shards_in_s3_without_an_index_are_told_apart_by_their_etag(s3, folder, cache) -> None:
    for path in folder.glob("*.index.json"):
        path.unlink()
    upload(s3, folder)
    assert keys(load("s3://shards/a/train-000000.tar", cache)[0])[0] == "0000"
    s3.copy_object(Bucket="shards", Key="a/train-000000.tar", CopySource="shards/a/train-000001.tar")
    assert keys(load("s3://shards/a/train-000000.tar", cache)[0])[0] == "0005"


def test_what_is_missing_in_s3_is_told_from_what_is_refused(s3, folder, cache, monkeypatch) -> None:
    upload(s3, folder)
    with pytest.raises(FileNotFoundError, match=r"1 of the 5 shards are missing: train-000004.tar"):
        load("s3://shards/a/train-{000000..000004}.tar", cache)
    with pytest.raises(SourceError, match="bucket does not exist"):
        load("s3://nowhere/a/train-*.tar", cache)
    with pytest.raises(FileNotFoundError, match="0 files match s3://shards/b/"):
        load("s3://shards/b", cache)
    anonymous = replace(cache, options={"anon": True})
    with pytest.raises(SourceError, match=r"access is denied.*check credentials") as error:
        load("s3://shards/a/train-*.tar", anonymous)
    assert error.value.cause == "refused shards"
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(SourceError, match="no credentials"):
        load("s3://shards/a/train-*.tar", replace(cache, options={"skip_instance_cache": True}))


def test_a_public_bucket_is_read_without_credentials(s3, s3_endpoint, folder, cache, monkeypatch) -> None:
    index_folder(folder)
    upload(s3, folder, ACL="public-read")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    anonymous = replace(cache, options={"anon": True, "endpoint_url": s3_endpoint})
    assert [key for index in load(f"s3://shards/a/{BRACES}", anonymous) for key in keys(index)][-1] == "0025"


def test_a_library_that_is_not_installed_is_named(cache, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"gs://: needs gcsfs. Install it with `pip install ssmpretrain\[gcs\]`"):
        find_shards("gs://bucket/a", where="x", cache=cache)


def test_the_next_shards_arrive_while_the_present_one_is_read(site, folder, cache) -> None:
    index_folder(folder)
    indexes = load(f"{site.url}/{BRACES}", cache)
    site.faults["train-000001.tar"] = ["always:404"]
    fetch_ahead([index.path for index in indexes[1:]])
    deadline = time.monotonic() + 10
    while len(list(cache.folder.glob("*.tar"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert site.requests["GET train-000003.tar"] == 1
    keys(indexes[3])
    assert site.requests["GET train-000003.tar"] == 1
    with pytest.raises(SourceError, match="404"):
        open_tar(indexes[1].path)
    assert site.requests["GET train-000001.tar"] == 1


def test_a_rank_asks_ahead_for_what_it_reads_a_block_later(site, folder, tmp_path, monkeypatch) -> None:
    from ssmpretrain.datamodules import ImageShards
    from ssmpretrain.datamodules.splits import shard_split

    index_folder(folder)
    asked: list[list[str]] = []
    monkeypatch.setattr(shard_split, "fetch_ahead", lambda shards: asked.append([str(one) for one in shards]))
    options = {"batch_size": 4, "num_workers": 0, "image_size": 32, "shuffle_buffer": 8, "seed": 3}
    loader = ImageShards(f"{site.url}/{BRACES}", **options, cache=str(tmp_path / "cache")).train_dataloader()
    batches = loader.dataset
    plan = [{str(batches.shards[shard]) for shard in batches.samples(key).shards} for key in loader.sampler]
    loader.sampler.set_epoch(0)
    for number, _ in enumerate(loader):
        later = plan[number + 2] if number + 2 < len(plan) else set()
        assert later <= {name for names in asked for name in names}


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_batches_over_a_faulty_server_are_those_of_local_files(request, folder, tmp_path, kind) -> None:
    import torch

    from ssmpretrain.datamodules import ImageShards

    index_folder(folder)
    options = {"batch_size": 4, "num_workers": 2, "image_size": 32, "shuffle_buffer": 8, "seed": 3}
    local = list(ImageShards(f"{folder}/{BRACES}", **options).train_dataloader())
    cache = {"cache": str(tmp_path / "cache"), "cache_limit": "1M"}
    if kind == "http":
        site = request.getfixturevalue("site")
        site.faults = {
            "train-000000.tar": ["reset:3000", "503"],
            "train-000001.tar": ["page"],
            "train-000002.tar": ["truncate:2000", "reset:100"],
            "index.json": ["503"],
        }
        remote = ImageShards(f"{site.url}/{BRACES}", **options, **cache)
    else:
        upload(request.getfixturevalue("s3"), folder)
        remote = ImageShards(f"s3://shards/a/{BRACES}", **options, **cache)
    batches = list(remote.train_dataloader())
    assert len(batches) == len(local) == 6
    for got, expected in zip(batches, local, strict=True):
        assert torch.equal(got["image"], expected["image"])
    if kind == "http":
        assert site.faults["train-000002.tar"] == []


def test_a_shard_that_is_gone_is_counted_by_cause_and_asked_for_once(site, folder, tmp_path, caplog) -> None:
    from ssmpretrain.datamodules import ImageShards

    index_folder(folder)
    site.faults["train-000002.tar"] = ["always:404"]
    options = {"batch_size": 4, "num_workers": 0, "image_size": 32, "max_bad_fraction": 1.0}
    images = ImageShards(f"{site.url}/{BRACES}", **options, cache=str(tmp_path / "cache"))
    assert len(list(images.train_dataloader())) == 6
    (counts,) = images.bad_samples()["train"].items()
    assert counts[0] == "missing shards" and set(counts[1]) == {f"{site.url}/train-000002.tar"}
    assert site.requests["GET train-000002.tar"] == 1
    assert "train-000002.tar: missing shards (the server says 404 Not Found). (1 so far)" in caplog.text


def test_the_cache_of_a_run_is_the_one_that_was_asked_for(tmp_path: Path) -> None:
    assert make_cache("x", str(tmp_path / "a"), "1M").folder == tmp_path / "a"
