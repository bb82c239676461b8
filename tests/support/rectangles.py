"""Images of coloured rectangles with boxes and masks, as a data module of detection gives them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from ssmpretrain.evaluation.dense.masks import encode_mask

NAMES = ["red", "green", "blue"]


def rectangles(number: int, count: int, H: int = 64, W: int = 96) -> tuple[Tensor, dict[str, Tensor]]:
    """Draw an image (3, H, W) with `count` rectangles, whose class is their colour."""
    draw = torch.Generator().manual_seed(number)
    image = 0.1 * torch.randn(3, H, W, generator=draw)
    boxes = torch.zeros(count, 4)
    masks = torch.zeros(count, H, W, dtype=torch.bool)
    classes = torch.randint(0, 3, (count,), generator=draw)
    for one in range(count):
        w, h = (int(torch.randint(16, 40, (), generator=draw)) for _ in range(2))
        x, y = int(torch.randint(0, W - w, (), generator=draw)), int(torch.randint(0, H - h, (), generator=draw))
        boxes[one] = torch.tensor([x, y, x + w, y + h])
        masks[:, y : y + h, x : x + w] = False
        masks[one, y : y + h, x : x + w] = True
        image[:, y : y + h, x : x + w] = 0.0
        image[classes[one], y : y + h, x : x + w] = 2.0
    return image, {"boxes": boxes, "classes": classes, "masks": masks, "crowd": torch.zeros(count, dtype=torch.bool)}


def annotation(objects: dict[str, Tensor], scale: int = 1) -> dict[str, Any]:
    """Describe the objects of an image in COCO's terms, at `scale` times the size of the batch's image."""
    rows = []
    for box, number, mask in zip(objects["boxes"], objects["classes"].tolist(), objects["masks"], strict=True):
        x1, y1, x2, y2 = (scale * box).tolist()
        whole = np.kron(mask.numpy(), np.ones((scale, scale)))
        row = {"category": number, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": float(whole.sum()), "iscrowd": 0}
        rows.append({**row, "segmentation": encode_mask(whole)})
    H, W = objects["masks"].shape[1:]
    return {"height": scale * H, "width": scale * W, "objects": rows}


def batch(numbers: Sequence[int], counts: Sequence[int], scale: int = 1, H: int = 64, W: int = 96) -> dict[str, Any]:
    """Stack images with these numbers, and with `counts` objects each; their files are `scale` times as large."""
    drawn = [rectangles(number, count, H, W) for number, count in zip(numbers, counts, strict=True)]
    size = torch.tensor([[H, W]] * len(drawn))
    return {
        "image": torch.stack([image for image, _ in drawn]),
        "label": torch.full((len(drawn),), -1),
        "objects": [objects for _, objects in drawn],
        "size": size,
        "whole_size": scale * size,
        "annotation": [annotation(objects, scale) for _, objects in drawn],
        "key": [f"scene-{number}" for number in numbers],
    }


class Rectangles(LightningDataModule):
    """Batches of drawn rectangles for training and for validation."""

    image_size, mean, std, classes = (64, 96), [0.0] * 3, [1.0] * 3, NAMES
    interpolation, batch_size = "bilinear", 2

    def __init__(self, train: list[dict[str, Any]], val: list[dict[str, Any]] | None = None) -> None:
        super().__init__()
        self.batches, self.val_batches = train, val or []

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val_batches, batch_size=None)  # type: ignore[arg-type]
