"""Damaged shards and images for the tests, and what a run makes of them."""

import io
import os
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ssmpretrain.datamodules import ImageShards
from ssmpretrain.datamodules.files import patience

SMALL: dict[str, Any] = {"batch_size": 4, "num_workers": 0, "image_size": 8}


def shards(folder: Path, **options: Any) -> ImageShards:
    return ImageShards(f"{folder}/train-*.tar", **{**SMALL, **options})


def evaluated(data: ImageShards) -> list[int]:
    """The samples that evaluation of the training shards yields."""
    return [int(key) for batch in data.bank_dataloader() for key in batch["key"]]


def causes(data: ImageShards, use: str = "bank") -> dict[str, int]:
    return {cause: sum(files.values()) for cause, files in data.bad_samples()[use].items()}


def causes_of(data: ImageShards) -> dict[str, int]:
    evaluated(data)
    return causes(data)


def forget_indexes(folder: Path) -> None:
    for path in folder.glob("*.index.json"):
        path.unlink()


def add_members(path: Path, *members: tarfile.TarInfo) -> None:
    with tarfile.open(path, "a") as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(bytes(member.size)) if member.isreg() else None)


def member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, target
    return info


def encoded(form: str, size: tuple[int, int] = (30, 20), mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, form, **options)
    return file.getvalue()


def announce(width: int, height: int, form: str) -> bytes:
    """A small image whose header announces another size."""
    image = bytearray(encoded(form))
    if form == "PNG":
        image[16:24] = struct.pack(">II", width, height)
        image[29:33] = struct.pack(">I", zlib.crc32(image[12:29]))
    elif form == "JPEG":
        frame = image.index(b"\xff\xc0")
        image[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    else:
        image[26:30] = struct.pack("<HH", width, height)
    return bytes(image)


def failing(monkeypatch: pytest.MonkeyPatch, name: str, number: int, times: int) -> list[float]:
    """Let the first reads of files with a name fail; returns the waits that follow."""
    waits: list[float] = []
    left = [times]
    read = os.pread

    def fail(file: int, count: int, start: int) -> bytes:
        if left[0] and os.readlink(f"/proc/self/fd/{file}").endswith(name):
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return read(file, count, start)

    monkeypatch.setattr(os, "pread", fail)
    monkeypatch.setattr(patience.time, "sleep", waits.append)
    return waits
