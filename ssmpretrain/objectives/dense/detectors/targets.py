"""Targets of detectors: the objects of an image that can train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Target:
    """The n objects of an image that train.

    Attributes:
        boxes: Corners x1, y1, x2, y2 in pixels, (n, 4), float32; every side is above 0.
        classes: Class of each object, (n,), int64, 0 to K - 1.
        masks: Pixels of each object, (n, H, W), bool; None if the data have no masks.
    """

    boxes: Tensor
    classes: Tensor
    masks: Tensor | None = None

    @classmethod
    def of(cls, objects: Mapping[str, Tensor]) -> Target:
        """Take the objects of an image from a batch, without crowds and without boxes that have no width or height."""
        boxes = objects["boxes"].float().reshape(-1, 4)
        keep = has_area(boxes)
        if "crowd" in objects:
            keep &= ~objects["crowd"].bool()
        masks = objects["masks"][keep] if "masks" in objects else None
        return cls(boxes[keep], objects["classes"][keep].long(), masks)

    def __len__(self) -> int:
        return len(self.boxes)


def has_area(boxes: Tensor) -> Tensor:
    """Return whether both sides of each box, (n, 4), are above 0, (n,), bool."""
    return (boxes[:, 2:] > boxes[:, :2]).all(dim=1)


def clipped(boxes: Tensor, size: Sequence[int]) -> Tensor:
    """Return boxes (..., 4) cut off at the border of an image of H, W pixels."""
    H, W = size[0], size[1]
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([x1.clamp(0, W), y1.clamp(0, H), x2.clamp(0, W), y2.clamp(0, H)], dim=-1)
