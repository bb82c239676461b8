"""Small images with rectangles, ellipses of pixels and crowds: as a COCO folder, and as shards."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ssmpretrain.datamodules.shards import ShardWriter
from ssmpretrain.datamodules.targets.run_lengths import encode_mask

NAMES = ["cat", "dog", "cow"]


def png(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "png")
    return content.getvalue()


def scene(number: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """An image (h, w, 3) of a size of its own, and 0 to 3 rectangles as an annotation has them; the third is a crowd.

    Each pixel of rectangle k has the value 100 + 50 k, and all others have 30.
    """
    rng = np.random.default_rng(number)
    h, w = (int(side) for side in rng.integers(20, 50, 2))
    pixels, objects = np.full((h, w, 3), 30, np.uint8), []
    for k in range(number % 4):
        x, y = (int(rng.integers(0, side - 9)) for side in (w, h))
        width, height = (int(side) for side in rng.integers(4, 9, 2))
        mask = np.zeros((h, w), dtype=bool)
        mask[y : y + height, x : x + width] = True
        pixels[mask] = 100 + 50 * k
        objects.append(
            {
                "category": k,
                "bbox": [x, y, width, height],
                "area": float(mask.sum()),
                "iscrowd": int(k == 2),
                "segmentation": encode_mask(mask),
            }
        )
    return pixels, objects


def sample(number: int) -> dict[str, bytes]:
    """The fields of a scene in a shard."""
    pixels, objects = scene(number)
    h, w = pixels.shape[:2]
    return {"png": png(pixels), "json": json.dumps({"height": h, "width": w, "objects": objects}).encode()}


def write_shards(folder: Path, changes: dict[int, dict[str, bytes]] | None = None, names: Any = NAMES) -> str:
    """Write 20 scenes into three shards; `changes` replaces fields by number. Return the folder."""
    with ShardWriter(folder, "shard", samples_per_shard=8) as writer:
        for number in range(20):
            writer.write(f"{number:02d}", {**sample(number), **(changes or {}).get(number, {})})
    if names:
        (folder / "classes.json").write_text(json.dumps(names))
    return str(folder)


def coco(count: int = 20, *, polygons: bool = True) -> dict[str, Any]:
    """The content of an annotation file of scenes. Categories have the ids 5, 7 and 90; crowds have uncompressed runs.

    Args:
        polygons: Whether masks are polygons; otherwise they are compressed run-length codes.
    """
    images, annotations = [], []
    for number in range(count):
        pixels, objects = scene(number)
        h, w = pixels.shape[:2]
        images.append({"id": 1000 + number, "file_name": f"{number:02d}.png", "height": h, "width": w})
        for one in objects:
            x, y, width, height = one["bbox"]
            corners = [x, y, x + width, y, x + width, y + height, x, y + height]
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": 1000 + number,
                    "category_id": [5, 7, 90][one["category"]],
                    "bbox": [float(side) for side in one["bbox"]],
                    "area": one["area"],
                    "iscrowd": one["iscrowd"],
                    "segmentation": [corners] if polygons and not one["iscrowd"] else one["segmentation"],
                }
            )
    categories = [{"id": number, "name": name} for number, name in zip((5, 7, 90), NAMES, strict=True)]
    return {"images": images, "annotations": annotations, "categories": categories[::-1]}


def write_coco(folder: Path, content: Any = None, count: int = 20) -> tuple[str, str]:
    """Write the images and an annotation file; return the folder and the file."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / "images" / f"{number:02d}.png").write_bytes(png(scene(number)[0]))
    file = folder / "instances.json"
    file.write_text(content if isinstance(content, str) else json.dumps(coco(count) if content is None else content))
    return str(folder / "images"), str(file)
