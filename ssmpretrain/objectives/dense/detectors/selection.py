"""Selection of detections: score, suppression within a class, the best of an image."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from ssmpretrain.objectives.dense.detectors.settings import Detector
from ssmpretrain.objectives.dense.detectors.targets import has_area


def best_of_each_class(boxes: Tensor, scores: Tensor, settings: Detector) -> dict[str, Tensor]:
    """Select the detections of an image.

    Args:
        boxes: Boxes (n, 1 or K, 4): one for all classes, or one for each.
        scores: Scores (n, K) in [0, 1].
        settings: Thresholds of scores and of suppression, and the largest number of detections.

    Returns:
        boxes (m, 4), scores (m,) and classes (m,), best first.
    """
    rows, classes = torch.where(scores > settings.least_score)
    chosen = boxes[rows, classes if boxes.shape[1] > 1 else torch.zeros_like(classes)]
    values = scores[rows, classes]
    keep = has_area(chosen)
    chosen, values, classes = chosen[keep], values[keep], classes[keep]
    best = batched_nms(chosen, values, classes, settings.most_overlap)[: settings.max_detections]
    return {"boxes": chosen[best], "scores": values[best], "classes": classes[best]}
