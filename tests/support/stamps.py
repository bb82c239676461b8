"""Photographic cut-outs of Debian's tuxpaint-stamps-default (GPL-2, never committed), pasted on photographs."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ssmpretrain.datamodules.shards.pack import ShardWriter
from ssmpretrain.datamodules.synthetic.scenes import photographs
from ssmpretrain.evaluation.dense.masks import encode_mask

STAMPS = Path("/usr/share/tuxpaint/stamps")
KINDS = {
    "mammal": "animals/mammals",
    "bird": "animals/birds",
    "fish": "animals/fish",
    "flower": "plants/flowers",
    "fruit": "food/fruit",
}
_NO_PHOTOGRAPHS = {"hedgehog", "echidna"}  # drawings, as is every folder named cartoon
_LEAST = 20  # visible pixels of an object


def files_of(kind: str, split: str) -> list[Path]:
    """Return the cut-outs of a kind: 70 % of the files for training, the others for validation."""
    found = sorted(
        path
        for path in (STAMPS / KINDS[kind]).rglob("*.png")
        if "cartoon" not in path.parts and path.stem not in _NO_PHOTOGRAPHS
        and not path.stem.endswith(("_mirror", "_flip", "_mirror_flip"))
    )  # fmt: skip
    order = np.random.default_rng(7).permutation(len(found))
    border = len(found) * 7 // 10
    return [found[number] for number in (order[:border] if split == "train" else order[border:])]


def compose(split: str, count: int, size: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield photographs with one to three cut-outs: `image` (H, W, 3), `classes` (H, W), and `masks` by category."""
    rng = np.random.default_rng([seed, split == "train"])
    backgrounds, files = photographs(split), [files_of(kind, split) for kind in KINDS]
    for _ in range(count):
        photo = backgrounds[int(rng.integers(len(backgrounds)))]
        side = int(rng.integers(100, min(photo.size)))
        left, top = (int(rng.integers(length - side)) for length in photo.size)
        picture = photo.resize((size, size), box=(left, top, left + side, top + side)).convert("RGB")
        owner, kinds = np.zeros((size, size), dtype=np.uint8), []
        for number in range(1, 2 + int(rng.integers(3))):
            kind = int(rng.integers(len(KINDS)))
            stamp = _cut_out(files[kind][int(rng.integers(len(files[kind])))], size * float(rng.uniform(0.3, 0.6)))
            if rng.random() < 0.5:
                stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            place = (int(rng.integers(size - stamp.width + 1)), int(rng.integers(size - stamp.height + 1)))
            alpha = stamp.getchannel("A")
            picture.paste(stamp, place, alpha)
            covered = Image.new("L", (size, size))
            covered.paste(alpha, place)
            owner[np.asarray(covered) > 127] = number
            kinds.append(kind)
        yield _scene(np.asarray(picture), owner, kinds)


def _scene(image: NDArray[np.uint8], owner: NDArray[np.uint8], kinds: list[int]) -> dict[str, Any]:
    masks = [(kind, owner == number) for number, kind in enumerate(kinds, start=1)]
    masks = [(kind, mask) for kind, mask in masks if mask.sum() >= _LEAST]
    classes = np.zeros_like(owner)
    for kind, mask in masks:
        classes[mask] = kind + 1
    return {"image": image, "classes": classes, "masks": masks}


def _cut_out(path: Path, longest: float) -> Image.Image:
    """Return a cut-out without its margin, whose longer side has this many pixels."""
    stamp = Image.open(path).convert("RGBA")
    stamp = stamp.crop(stamp.getchannel("A").point(lambda value: 255 * (value > 127)).getbbox())
    factor = longest / max(stamp.size)
    return stamp.resize((max(1, round(stamp.width * factor)), max(1, round(stamp.height * factor))))


def write_shards(folder: Path, split: str, scenes: list[dict[str, Any]]) -> Path:
    """Write scenes as a shard with class maps and objects, and return it."""
    with ShardWriter(folder, split) as writer:
        for number, scene in enumerate(scenes):
            height, width = scene["classes"].shape
            about = {"height": height, "width": width, "objects": [_object(*one) for one in scene["masks"]]}
            fields = {
                "png": _png(scene["image"]),
                "seg.png": _png(scene["classes"]),
                "json": json.dumps(about).encode(),
            }
            writer.write(f"{split}{number:04d}", fields)
    return folder / f"{split}-000000.tar"


def _png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def _object(kind: int, mask: NDArray[np.bool_]) -> dict[str, Any]:
    rows, columns = np.nonzero(mask)
    left, top = int(columns.min()), int(rows.min())
    box = [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top]
    return {"category": kind, "bbox": box, "area": int(mask.sum()), "iscrowd": 0, "segmentation": encode_mask(mask)}
