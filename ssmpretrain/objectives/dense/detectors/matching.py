"""Matching of anchors and boxes to objects, and sampling among them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, Matcher
from torchvision.ops import box_iou

from ssmpretrain.objectives.dense.detectors.targets import Target

BACKGROUND, IGNORED = Matcher.BELOW_LOW_THRESHOLD, Matcher.BETWEEN_THRESHOLDS  # -1 and -2


class ObjectMatcher(Matcher):  # type: ignore[misc]  # torchvision has no types
    """Assign each box to an object by their IoU, to the background, or to neither.

    Args:
        positive: IoU from which a box belongs to the object that it overlaps most.
        negative: IoU below which a box is background. Boxes between the two do not train.
        low_quality: Whether each object also takes the boxes that overlap it most, below `positive`.
        minimum: IoU that such a box has at least. It is above 0 in any case.
        to_best: Whether such a box goes to the object that it overlaps most. Otherwise it goes to the object that took
            it, and the last one if several did.
    """

    def __init__(
        self, positive: float, negative: float, low_quality: bool = False, minimum: float = 0.0, to_best: bool = True
    ) -> None:
        super().__init__(positive, negative, allow_low_quality_matches=low_quality)
        self.minimum, self.to_best = minimum, to_best

    def match(self, boxes: Tensor, objects: Tensor) -> Tensor:
        """Return for each box (N, 4) the index of its object (M, 4), -1 for background or -2 for neither, (N,)."""
        if not len(boxes) or not len(objects):
            return torch.full((len(boxes),), BACKGROUND, dtype=torch.int64, device=boxes.device)
        matches: Tensor = self(box_iou(objects, boxes))
        return matches

    def set_low_quality_matches_(self, matches: Tensor, all_matches: Tensor, match_quality_matrix: Tensor) -> None:
        best = match_quality_matrix.amax(dim=1, keepdim=True)  # of each object, (M, 1)
        taken = (match_quality_matrix == best) & (best > 0) & (best >= self.minimum)
        if self.to_best:
            rows = all_matches
        else:
            order = torch.arange(1, len(taken) + 1, device=taken.device).unsqueeze(1)
            rows = (taken * order).amax(dim=0) - 1
        boxes = taken.any(dim=0)
        matches[boxes] = rows[boxes]


class Samples(NamedTuple):
    """Boxes of an image that train a stage.

    boxes: Corners, (n, 4), float32.
    classes: Class of each box, (n,), int64; K for background.
    objects: Index of the object of each box, (n,), int64; 0 for background.
    added: Whether the box is that of an object itself, (n,), bool.
    """

    boxes: Tensor
    classes: Tensor
    objects: Tensor
    added: Tensor

    def take(self, index: Tensor) -> Samples:
        """Return the boxes that an index or a mask selects."""
        return Samples(*(part[index] for part in self))


def label(boxes: Tensor, target: Target, matcher: ObjectMatcher, background: int) -> Samples:
    """Label boxes (n, 4) of an image with the classes of the objects that they match."""
    objects = matcher.match(boxes, target.boxes)
    classes = torch.full_like(objects, background)
    positive = objects >= 0
    classes[positive] = target.classes[objects[positive]]
    return Samples(boxes, classes, objects.clamp(min=0), torch.zeros_like(positive))


def with_objects(boxes: Tensor, target: Target, matcher: ObjectMatcher, background: int) -> Samples:
    """Label boxes (n, 4) of an image, and the boxes of its objects behind them."""
    samples = label(torch.cat([boxes, target.boxes]), target, matcher, background)
    added = torch.arange(len(samples.boxes), device=boxes.device) >= len(boxes)
    return samples._replace(added=added)


def drawn(samples: Samples, sampler: BalancedPositiveNegativeSampler, background: int) -> Samples:
    """Draw positive boxes and background of an image from torch's generator, in the order of the boxes."""
    positive, negative = sampler([(samples.classes != background).long()])
    return samples.take((positive[0] | negative[0]).bool())
