"""Class maps: PNG files become numbers as stored, and everything else becomes one phrase."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from ssmpretrain.datamodules.faults import BadSample
from ssmpretrain.datamodules.targets.class_map import (
    class_table,
    decode_class_map,
    decode_classes,
    decode_numbers,
    encode_classes,
    renumbered,
)

NUMBERS = np.array([[0, 1, 2], [3, 1, 0]], dtype=np.uint8)


def png(pixels: np.ndarray, palette: bool = False, **options: int) -> bytes:
    content = io.BytesIO()
    image = Image.fromarray(pixels, "P" if palette else None)
    if palette:
        image.putpalette([200 - number % 200 for number in range(768)])
    image.save(content, "png", **options)
    return content.getvalue()


def grey(pixels: np.ndarray, depth: int) -> bytes:
    """A grey PNG of `depth` bits; Pillow writes none of 2 and 4."""
    h, w = pixels.shape
    bits = np.unpackbits(pixels[..., None], axis=-1)[..., 8 - depth :].reshape(h, -1)
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in bits)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, depth, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (png(NUMBERS), NUMBERS),
        (png(NUMBERS, palette=True), NUMBERS),
        (png(NUMBERS, palette=True, bits=2), NUMBERS),
        (png(NUMBERS % 2, palette=True, bits=1), NUMBERS % 2),
        (png(NUMBERS.astype(np.uint16) * 1000), NUMBERS.astype(np.uint16) * 1000),
        (png(NUMBERS % 2 == 1), NUMBERS % 2),  # grey of one bit
        (grey(NUMBERS, 2), NUMBERS),
        (grey(NUMBERS, 4), NUMBERS),
    ],
    ids=["8", "palette", "palette of 2", "palette of 1", "16", "1", "2", "4"],
)
def test_numbers_are_those_of_the_file_whatever_its_bits(content: bytes, expected: np.ndarray) -> None:
    assert decode_numbers(content).tolist() == expected.tolist()


COLOURS = np.zeros((2, 3, 3), np.uint8)


@pytest.mark.parametrize(
    ("content", "cause", "detail"),
    [
        (png(COLOURS), "masks in colours", "RGB, where a pixel has one number"),
        (png(np.zeros((2, 3, 4), np.uint8)), "masks in colours", "RGB with transparency"),
        (png(np.zeros((2, 3, 2), np.uint8)), "masks in colours", "grey with transparency"),
        (b"<html>", "masks that are no PNG", "a web page"),
        (b"", "masks that are no PNG", "0 bytes"),
        (b"\xff\xd8\xff\xc0\0\x11\x08\0\x02\0\x03\x03", "masks that are no PNG", "a JPEG or WebP image"),
        (png(NUMBERS)[:40], "undecodable masks", ""),
        (png(NUMBERS)[:24], "undecodable masks", "header"),
        (png(np.zeros((30, 40), np.uint8)), "giant masks", "40 x 30"),
        (png(NUMBERS + 3), "numbers without a class", "4, 5, 6 at 4 pixels; there are 4"),
        (png(NUMBERS.astype(np.uint16) * 1000), "numbers without a class", "1000, 2000, 3000"),
    ],
    ids=["RGB", "RGBA", "LA", "web", "empty", "JPEG", "cut", "header", "giant", "beyond", "16 bits"],
)
def test_a_mask_that_cannot_be_used_has_a_cause(content: bytes, cause: str, detail: str) -> None:
    with pytest.raises(BadSample) as bad:
        decode_classes(content, class_table(4), "there are 4", max_pixels=1000)
    assert bad.value.cause == cause and detail in bad.value.detail


def test_a_table_translates_numbers_and_ignores_255() -> None:
    table = class_table(2, {0: 1, 3: 0, 1: 255}, ignore=[2])
    assert table[[0, 1, 2, 3, 4, 255]].tolist() == [1, 255, 255, 0, -1, 255]
    assert class_table(2, {0: 0, 255: 1})[[0, 255]].tolist() == [0, 1]
    assert renumbered(table, (7, 5))[[0, 1, 2, 3, 4, 255]].tolist() == [5, 255, 255, 7, -1, 255]


def test_a_class_map_survives_its_encoding() -> None:
    classes = torch.tensor([[0, 254, 255], [1, 2, 3]], dtype=torch.uint8)
    assert torch.equal(decode_classes(encode_classes(classes), class_table(255), ""), classes)


def test_a_mask_has_the_size_of_its_image() -> None:
    raw = {"png": png(COLOURS), "seg.png": png(NUMBERS.T.copy())}
    with pytest.raises(BadSample) as bad:
        decode_class_map(raw, class_table(4), "")
    assert bad.value.describe() == "masks of another size (image 3 x 2, mask 2 x 3 pixels)"
    with pytest.raises(BadSample, match="images without a mask"):
        decode_class_map({"png": png(COLOURS)}, class_table(4), "")
