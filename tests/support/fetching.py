"""Shards of a faulty server, fetched into a cache, for the tests."""

from pathlib import Path

from faulty_server import FaultySite

from ssmpretrain.datamodules.files.patience import Patience
from ssmpretrain.datamodules.remote.cache import ShardCache
from ssmpretrain.datamodules.remote.server import RemoteFile
from ssmpretrain.datamodules.tar.index import checksum

QUICK = Patience(attempts=4, first_wait=0.01, longest_wait=0.2, timeout=0.5, window=0.4, least_bytes=1000)
NAME = "train-000000.tar"


def shard(site: FaultySite, number: int = 0, **known) -> RemoteFile:
    return RemoteFile(f"{site.url}/train-{number:06d}.tar", **known)


def known(site: FaultySite, folder: Path, number: int = 0) -> RemoteFile:
    path = folder / f"train-{number:06d}.tar"
    return shard(site, number, bytes=path.stat().st_size, sha256=checksum(path))


def fetch(cache: ShardCache, file: RemoteFile) -> bytes:
    with cache.hold(file) as path:
        return path.read_bytes()
