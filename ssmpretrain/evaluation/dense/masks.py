"""Masks of objects as run-length codes: pasted from a detector's small masks, encoded, decoded.

A run-length code (RLE) is a dictionary of `size`, [height, width] in pixels, and `counts`, a str: COCO's compressed
form, read column by column.

Legend: n objects, S side of a small mask, H x W pixels of the image.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ssmpretrain.base.errors import UserError

Rle = dict[str, Any]
_MOST_PIXELS = 2**28  # of a box: 1 GiB. Detectors clip boxes to the image, which has 100 million pixels at most


def pycocotools(module: str) -> Any:
    """Return the module "mask", "coco" or "cocoeval" of pycocotools, which is an optional dependency.

    Raises:
        UserError: If pycocotools is not installed.
    """
    try:
        return import_module(f"pycocotools.{module}")
    except ImportError as error:
        raise UserError(
            f"detection: masks and average precision need pycocotools, which cannot be imported ({error}). "
            "Run `pip install ssmpretrain[detection]`, or `pip install pycocotools`."
        ) from error


def encode_mask(mask: NDArray[Any]) -> Rle:
    """Encode a mask (H, W), bool or 0 and 1."""
    code = pycocotools("mask").encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in code["size"]], "counts": code["counts"].decode("ascii")}


def decode_mask(code: Rle) -> NDArray[np.bool_]:
    """Decode a mask to (H, W), bool."""
    return pycocotools("mask").decode(code).astype(bool)  # type: ignore[no-any-return]


def mask_area(code: Rle) -> int:
    """Return the number of pixels of a mask."""
    return int(pycocotools("mask").area(code))


def paste_masks(probabilities: Tensor, boxes: Tensor, height: int, width: int) -> list[Rle]:
    """Resize the small mask of each object to its box, take pixels above 0.5, and encode them, object by object.

    The memory is that of one mask of the image, whatever n is. The pixels are those of torchvision's
    `paste_masks_in_image` above 0.5: the small mask gets a border of one pixel, the box grows with it and is rounded
    towards zero, and the mask is resized bilinearly.

    Args:
        probabilities: Small masks, (n, S, S) in [0, 1].
        boxes: Corners x1, y1, x2, y2 in pixels of the image, (n, 4). They may lie partly or wholly outside.
        height, width: Size of the image in pixels.

    Returns:
        One run-length code of size [height, width] per object.

    Raises:
        UserError: If the shapes do not fit, a number is not finite, or a box has more than 2**28 pixels.
    """
    _check(probabilities, boxes)
    small = F.pad(probabilities.detach().float().cpu(), (1, 1, 1, 1))
    corners = _grown(boxes.detach().float().cpu(), probabilities.shape[-1])
    canvas = np.zeros((height, width), dtype=np.uint8, order="F")
    codes = []
    for mask, (left, top, right, bottom) in zip(small, corners.tolist(), strict=True):
        size = max(bottom - top + 1, 1), max(right - left + 1, 1)
        if size[0] * size[1] > _MOST_PIXELS:
            raise UserError(
                f"paste_masks: boxes are in pixels of the image; got one of {size[0]:,} x {size[1]:,} pixels for an "
                f"image of {height} x {width}. Scale the boxes to the image, and clip them."
            )
        resized = F.interpolate(mask[None, None], size, mode="bilinear", align_corners=False)[0, 0] > 0.5
        y, x = max(top, 0), max(left, 0)
        visible = resized[y - top :, x - left :][: max(height - y, 0), : max(width - x, 0)]
        window = canvas[y : y + visible.shape[0], x : x + visible.shape[1]]
        window[...] = visible.numpy()
        codes.append(encode_mask(canvas))
        window[...] = 0
    return codes


def _grown(boxes: Tensor, side: int) -> Tensor:
    """Return the boxes of the small masks with their border, in whole pixels, (n, 4)."""
    scale = (side + 2) / side
    half = (boxes[:, 2:] - boxes[:, :2]) * 0.5 * scale
    centre = (boxes[:, 2:] + boxes[:, :2]) * 0.5
    return torch.cat([centre - half, centre + half], dim=1).to(torch.int64)


def _check(probabilities: Tensor, boxes: Tensor) -> None:
    n = len(probabilities)
    if probabilities.ndim != 3 or probabilities.shape[1] != probabilities.shape[2] or boxes.shape != (n, 4):
        raise UserError(
            f"paste_masks: n square masks (n, S, S) have n boxes (n, 4); got {tuple(probabilities.shape)} and "
            f"{tuple(boxes.shape)}. Leave out a channel axis of the masks."
        )
    if not (boxes.isfinite().all() and probabilities.isfinite().all()):
        raise UserError("paste_masks: masks and boxes are finite numbers; got NaN or infinity. Look at the detector.")
