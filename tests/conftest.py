"""What several test modules use."""

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # see ssmpretrain.cli.main

import torch


@pytest.fixture(scope="session")
def write_shard() -> Callable[..., Path]:
    """Writes a webdataset shard of small noise images with labels 0 and 1, and returns its path."""

    def write(path: Path, count: int = 8, size: int = 32) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = torch.Generator().manual_seed(0)
        with tarfile.open(path, "w") as tar:
            for i in range(count):
                pixels = torch.randint(256, (size, size, 3), dtype=torch.uint8, generator=noise)
                image = io.BytesIO()
                Image.fromarray(pixels.numpy()).save(image, "PNG")
                for suffix, content in (("png", image.getvalue()), ("cls", str(i % 2).encode())):
                    member = tarfile.TarInfo(f"{i:04d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        return path

    return write
