"""Fixtures: a folder of shards, and a cache for copies of them."""

from pathlib import Path

import pytest
from fetching import QUICK

from ssmpretrain.datamodules.remote.cache import ShardCache


@pytest.fixture
def folder(make_shards) -> Path:
    return make_shards([12, 12, 12, 12])


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory) -> ShardCache:
    return ShardCache(tmp_path_factory.mktemp("cache"), 1 << 30, patience=QUICK)
