"""What several test modules use."""

import io
import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # see ssmpretrain.cli.main
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # `make test` runs two tests at a time

import torch
from torchvision.io import encode_png

MakeShards = Callable[..., Path]

# Files of a minute or more: first, so that no process of `make test` is left alone with one at the end.
_LONG = ("test_interpreter", "test_compiled_kernels", "test_ranks", "test_fsdp", "test_fit", "test_recipes")
_NOT_QUICK = {
    line for line in Path(__file__).with_name("not_quick.txt").read_text().splitlines() if not line.startswith("#")
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick",
        action="store_true",
        help="each test with its first parameters alone, without the files that are long",
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if config.getoption("quick") and collection_path.stem in _NOT_QUICK else None


@pytest.hookimpl(trylast=True)  # after `-m`
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _LONG.index(item.path.stem) if item.path.stem in _LONG else len(_LONG))
    if config.getoption("quick"):
        first = {_test_of(item): item for item in reversed(items) if _test_of(item).split("::")[-1] not in _NOT_QUICK}
        config.hook.pytest_deselected(items=[item for item in items if first.get(_test_of(item)) is not item])
        items[:] = [item for item in items if first.get(_test_of(item)) is item]


def _test_of(item: pytest.Item) -> str:
    """Name the test function of an item, without its parameters."""
    return item.nodeid.partition("[")[0]


def png(number: int, side: int = 12) -> bytes:
    """A small picture that its number tells from others."""
    generator = torch.Generator().manual_seed(number)
    image = torch.randint(0, 256, (3, side, side), generator=generator, dtype=torch.uint8)
    return encode_png(image, compression_level=1).numpy().tobytes()


@pytest.fixture(scope="session")
def write_shard() -> Callable[..., Path]:
    """Writes a webdataset shard of small noise images with labels 0 and 1, perhaps captions, and returns its path."""

    def write(path: Path, count: int = 8, size: int = 32, captions: bool = False) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = torch.Generator().manual_seed(0)
        with tarfile.open(path, "w") as tar:
            for i in range(count):
                pixels = torch.randint(256, (size, size, 3), dtype=torch.uint8, generator=noise)
                image = io.BytesIO()
                Image.fromarray(pixels.numpy()).save(image, "PNG")
                fields = {"png": image.getvalue(), "cls": str(i % 2).encode()}
                if captions:
                    fields["txt"] = f"picture number {i}".encode()
                for suffix, content in fields.items():
                    member = tarfile.TarInfo(f"{i:04d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        return path

    return write


@pytest.fixture
def make_shards(tmp_path: Path) -> MakeShards:
    """Write shards of the given sizes with keys "0000", "0001", ... and labels number % 10; bad: {number: fields}."""

    from ssmpretrain.datamodules.shards.pack import ShardWriter  # imports webdataset, which a GPU image may lack

    def make(sizes: Sequence[int], prefix: str = "train", bad: dict[int, dict[str, bytes]] | None = None) -> Path:
        number = 0
        for shard, size in enumerate(sizes):
            with ShardWriter(tmp_path / f"{prefix}-parts" / str(shard), prefix) as writer:
                for _ in range(size):
                    fields = {"png": png(number), "cls": str(number % 10).encode()}
                    writer.write(f"{number:04d}", (bad or {}).get(number, fields))
                    number += 1
            for suffix in (".tar", ".index.json"):
                source = tmp_path / f"{prefix}-parts" / str(shard) / f"{prefix}-000000{suffix}"
                source.rename(tmp_path / f"{prefix}-{shard:06d}{suffix}")
        return tmp_path

    return make
