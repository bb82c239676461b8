"""Cross-entropy of pixels with ignored pixels, by its two published means."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

LossMean = Literal["all", "labelled"]
IGNORED = 255  # class of a pixel that neither trains nor counts


def pixel_cross_entropy(logits: Tensor, classes: Tensor, mean: LossMean) -> Tensor:
    """Compute the cross-entropy of the labelled pixels, divided by a number of pixels; 0 if no pixel is labelled.

    Args:
        logits: Logits (B, K, H, W), of any floating-point type; computed in float32.
        classes: Class of each pixel, (B, H, W), integers from 0 to K - 1, or 255 to ignore the pixel.
        mean: "all" divides by the number of all pixels, as mmsegmentation does by default: the more pixels are
            ignored, the smaller is the loss. "labelled" divides by the number of labelled pixels, as torch does.

    Returns:
        The loss, a scalar, float32.
    """
    total = F.cross_entropy(logits.float(), classes.long(), ignore_index=IGNORED, reduction="sum")
    pixels = classes.numel() if mean == "all" else (classes != IGNORED).sum().clamp(min=1)
    return total / pixels
