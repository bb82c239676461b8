"""Losses of boxes and masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import generalized_box_iou_loss, roi_align

from ssmpretrain.objectives.dense.detectors.matching import Samples
from ssmpretrain.objectives.dense.detectors.targets import Target

_MASKS_AT_ONCE = 16  # 16 masks of 800 x 1333 are 68 MB in float32


def box_loss(
    kind: Literal["l1", "smooth_l1", "giou"],
    deltas: Tensor,
    boxes: Tensor,
    objects: Tensor,
    coder: BoxCoder,
    beta: float,
) -> Tensor:
    """Sum the loss of deltas (n, 4) that shall move boxes (n, 4) to their objects (n, 4).

    Args:
        kind: "l1" or "smooth_l1" of the deltas, or "giou": 1 minus the generalised IoU of the moved boxes.
        deltas: Predicted deltas, float32.
        boxes: Boxes that the deltas move, in pixels; every side is above 0.
        objects: Boxes of the matched objects, in pixels; every side is above 0.
        coder: Maps between deltas and boxes.
        beta: Difference at which "smooth_l1" turns from a square into a line.
    """
    if kind == "giou":
        overlap: Tensor = generalized_box_iou_loss(coder.decode_single(deltas, boxes), objects, reduction="sum")
        return overlap
    wanted = coder.encode_single(objects, boxes)
    if kind == "l1":
        return F.l1_loss(deltas, wanted, reduction="sum")
    return F.smooth_l1_loss(deltas, wanted, reduction="sum", beta=beta)


def mask_targets(target: Target, samples: Samples, side: int, aligned: bool, threshold: float | None) -> Tensor:
    """Crop the mask of each box's object to the box, resized to (n, side, side), float32.

    Args:
        target: The objects of the image, with masks.
        samples: The n positive boxes.
        side: Pixels along a side of the result.
        aligned: Whether RoIAlign shifts boxes by half a pixel.
        threshold: Value from which a pixel is 1, or else 0. None keeps the value.
    """
    assert target.masks is not None
    cropped = samples.boxes.new_zeros(len(samples.boxes), side, side)
    present = torch.unique(samples.objects)
    for some in present.split(_MASKS_AT_ONCE):
        mine = torch.isin(samples.objects, some)
        row = torch.searchsorted(some, samples.objects[mine])
        boxes = torch.cat([row.unsqueeze(1).to(samples.boxes), samples.boxes[mine]], dim=1)
        masks = target.masks[some].unsqueeze(1).to(samples.boxes)
        cropped[mine] = roi_align(masks, boxes, side, aligned=aligned)[:, 0]
    return cropped if threshold is None else (cropped >= threshold).to(cropped)


def mask_loss(logits: Tensor, samples: Sequence[Samples], wanted: Sequence[Tensor]) -> Tensor:
    """Compute the mean binary cross-entropy of the masks (n, K, M, M) of the boxes' classes; 0 if there is no box."""
    if not len(logits):
        return logits.sum()  # 0, and every parameter gets a gradient
    classes = torch.cat([one.classes for one in samples])
    mine = logits[torch.arange(len(classes), device=classes.device), classes]
    return F.binary_cross_entropy_with_logits(mine, torch.cat(list(wanted)))
