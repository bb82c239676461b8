from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torchvision.io import encode_png

from ssmpretrain.datamodules.pack import ShardWriter

MakeShards = Callable[..., Path]


def png(number: int, side: int = 12) -> bytes:
    """A small picture that its number tells from others."""
    generator = torch.Generator().manual_seed(number)
    image = torch.randint(0, 256, (3, side, side), generator=generator, dtype=torch.uint8)
    return encode_png(image, compression_level=1).numpy().tobytes()


@pytest.fixture
def make_shards(tmp_path: Path) -> MakeShards:
    """Write shards of the given sizes with keys "0000", "0001", ... and labels number % 10; bad: {number: fields}."""

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
