"""Small images with masks, as PNG files and in folders."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

Scene = tuple[np.ndarray, np.ndarray]


def scene(number: int, classes: int = 4) -> Scene:
    """An image (h, w, 3) whose colour tells the class of each pixel, and its mask (h, w); sizes differ."""
    rng = np.random.default_rng(number)
    h, w = (int(side) for side in rng.integers(20, 50, 2))
    mask = rng.integers(0, classes, (h // 8 + 1, w // 8 + 1), dtype=np.uint8).repeat(8, 0).repeat(8, 1)[:h, :w]
    return (mask[..., None] * np.array([40, 20, 60])).astype(np.uint8), mask


def encoded(pixels: np.ndarray, kind: str = "png", mode: str | None = None, **options: Any) -> bytes:
    content = io.BytesIO()
    image = Image.fromarray(pixels, mode)
    if mode == "P":
        image.putpalette([number * 7 % 256 for number in range(768)])
    image.save(content, kind, **options)
    return content.getvalue()


@pytest.fixture
def write_folder(tmp_path: Path) -> Callable[..., Path]:
    """Write images and masks, and return the folder above them; `change` maps the numbers of a mask."""

    def write(
        images: str = "images",
        masks: str = "masks",
        *,
        count: int = 20,
        image: str = "{:02d}.jpg",
        mask: str = "{:02d}.png",
        change: Callable[[np.ndarray], np.ndarray] = lambda mask: mask,
        **options: Any,
    ) -> Path:
        for number in range(count):
            pixels, classes = scene(number)
            for path, content in (
                (tmp_path / images / image.format(number), encoded(pixels, "jpeg")),
                (tmp_path / masks / mask.format(number), encoded(change(classes), **options)),
            ):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        return tmp_path

    return write
