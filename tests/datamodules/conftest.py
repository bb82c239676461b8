from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_server import FaultySite, serve


@pytest.fixture
def site(folder: Path) -> Iterator[FaultySite]:
    """A web server of the shards of the test."""
    with serve(folder) as site:
        yield site
