"""Mask R-CNN and Cascade Mask R-CNN: proposals, one or three stages of box heads, and mask heads.

B images, n boxes, K classes
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder

from ssmpretrain.objectives.dense.detectors.box_losses import box_loss, mask_loss, mask_targets
from ssmpretrain.objectives.dense.detectors.heads import BOX_SIDE, MASK_SIDE, Boxes, Masks
from ssmpretrain.objectives.dense.detectors.match import Match
from ssmpretrain.objectives.dense.detectors.matching import ObjectMatcher, Samples, drawn, label, with_objects
from ssmpretrain.objectives.dense.detectors.proposals import ProposalNetwork
from ssmpretrain.objectives.dense.detectors.roi_align import PyramidAlign
from ssmpretrain.objectives.dense.detectors.selection import best_of_each_class
from ssmpretrain.objectives.dense.detectors.settings import Detector
from ssmpretrain.objectives.dense.detectors.targets import Target, clipped, has_area

_STAGE_IOU = (0.5, 0.6, 0.7)
Sizes = Sequence[tuple[int, int]]


class Stage(nn.Module):
    """A box head with the IoU that its positive boxes have, and the coder of its deltas.

    Args:
        number: Number of the stage, from 0.
        heads: The box head.
        settings: Settings of the detector.
        match: Rules that differ between published implementations.
    """

    def __init__(self, number: int, heads: Boxes, settings: Detector, match: Match) -> None:
        super().__init__()
        iou = _STAGE_IOU[number]
        takes = match.low_quality_boxes and settings.name == "mask_rcnn"
        self.heads, self.coder = heads, BoxCoder(match.coder_weights[number])
        self.matcher = ObjectMatcher(iou, iou, takes, iou, match.low_quality_to_best)
        self.kind: Literal["l1", "smooth_l1", "giou"]
        self.kind = match.box_loss if settings.box_loss == "match" else settings.box_loss
        self.weight, self.beta = settings.box_loss_weight, match.beta

    def losses(self, logits: Tensor, deltas: Tensor, samples: Samples, targets: Sequence[Target]) -> dict[str, Tensor]:
        """Compute the losses of logits (n, K + 1) and deltas (n, 1 or K, 4) for the boxes of all images.

        Args:
            logits, deltas: Output of the head.
            samples: The n boxes; `objects` numbers the objects of all images.
            targets: The objects of each image.
        """
        background = logits.shape[1] - 1
        positive = samples.classes != background
        objects = torch.cat([target.boxes for target in targets])[samples.objects[positive]]
        mine = _of_class(deltas[positive], samples.classes[positive])
        of_boxes = box_loss(self.kind, mine, samples.boxes[positive], objects, self.coder, self.beta)
        count = max(1, len(logits))
        of_classes = F.cross_entropy(logits, samples.classes, reduction="sum")
        return {"classes": of_classes / count, "boxes": self.weight * of_boxes / count}


class RCNN(nn.Module):
    """Detector with proposals: Mask R-CNN with one stage, Cascade Mask R-CNN with three, or either without masks.

    Args:
        width: Channels of the maps.
        strides: Stride of each map in pixels, finest first. The boxes read all maps but the last.
        num_classes: K.
        settings: Settings of the detector.
        match: Rules that differ between published implementations.

    Source: He et al., "Mask R-CNN" (arXiv:1703.06870); Cai & Vasconcelos, "Cascade R-CNN" (arXiv:1906.09756).
    """

    def __init__(self, width: int, strides: Sequence[int], num_classes: int, settings: Detector, match: Match) -> None:
        super().__init__()
        self.num_classes, self.settings, self.rules = num_classes, settings, match
        self.proposals = ProposalNetwork(width, strides, settings.proposals, match)
        read = strides[:-1]
        self.box_align = PyramidAlign(read, BOX_SIDE, match.samples_per_bin, match.aligned)
        self.mask_align = PyramidAlign(read, MASK_SIDE, match.samples_per_bin, match.aligned)
        stages, masks = settings.kind.stages, settings.mask_head.heads if settings.kind.masks else 0
        self.stages = nn.ModuleList(
            Stage(number, Boxes(width, num_classes, settings.shares_deltas, settings.box_head, match), settings, match)
            for number in range(stages)
        )
        self.masks = nn.ModuleList(Masks(width, num_classes, settings.mask_head, match) for _ in range(masks))
        self.sampler = BalancedPositiveNegativeSampler(settings.samples, settings.positive_fraction)

    def forward(
        self, maps: Sequence[Tensor], sizes: Sizes, targets: Sequence[Target] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Return the losses if there are targets, otherwise the detections of each image.

        Args:
            maps: Maps (B, C, h, w), float32, finest first.
            sizes: Height and width in pixels of each image without padding.
            targets: The objects of each image, or None.

        Returns:
            Losses by name; or for each image a dict with boxes (n, 4), scores (n,), classes (n,), and masks (n, 28, 28)
            as probabilities if the detector has mask heads.
        """
        boxes, losses = self.proposals(maps, sizes, targets)
        if targets is None:
            return self.detect(maps, sizes, boxes)
        return {**losses, **self.losses(maps, sizes, boxes, targets)}

    # Training

    def losses(
        self, maps: Sequence[Tensor], sizes: Sizes, boxes: list[Tensor], targets: Sequence[Target]
    ) -> dict[str, Tensor]:
        """Compute the losses of all stages, from proposals `boxes`, (n, 4) for each image."""
        losses: dict[str, Tensor] = {}
        samples: list[Samples] = []
        for number, stage in enumerate(self._stages()):
            samples = self._samples(stage, boxes, targets, first=number == 0)
            logits, deltas = self._heads(stage, maps, [one.boxes for one in samples])
            parts = stage.losses(logits, deltas, _joined(samples, targets), targets)
            if number < len(self.masks):
                parts["masks"] = self._mask_loss(self.masks[number], maps, samples, targets)
            suffix = f"_{number + 1}" if len(self.stages) > 1 else ""
            weight = self.rules.stage_weights[number]
            losses |= {name + suffix: weight * value for name, value in parts.items()}
            if number + 1 < len(self.stages):
                boxes = self._moved_in_training(stage, samples, logits.detach(), deltas.detach(), sizes)
        return losses

    def _samples(self, stage: Stage, boxes: Sequence[Tensor], targets: Sequence[Target], first: bool) -> list[Samples]:
        pairs = zip(boxes, targets, strict=True)
        if not first and not self.rules.resample:
            return [label(mine, target, stage.matcher, self.num_classes) for mine, target in pairs]
        return [
            drawn(with_objects(mine, target, stage.matcher, self.num_classes), self.sampler, self.num_classes)
            for mine, target in pairs
        ]

    def _moved_in_training(
        self, stage: Stage, samples: Sequence[Samples], logits: Tensor, deltas: Tensor, sizes: Sizes
    ) -> list[Tensor]:
        """Move the sampled boxes for the next stage; leave out empty ones, and objects if they are added again."""
        counts = [len(one.boxes) for one in samples]
        moved = []
        parts = zip(samples, torch.split(logits, counts), torch.split(deltas, counts), sizes, strict=True)
        for one, scores, steps, size in parts:
            best = scores[:, :-1].argmax(dim=1)
            classes = torch.where(one.classes == self.num_classes, best, one.classes)
            boxes = clipped(_decoded(stage.coder, _of_class(steps, classes), one.boxes), size)
            keep = has_area(boxes)
            moved.append(boxes[keep & ~one.added if self.rules.resample else keep])
        return moved

    def _mask_loss(
        self, head: nn.Module, maps: Sequence[Tensor], samples: Sequence[Samples], targets: Sequence[Target]
    ) -> Tensor:
        positive = [one.take(one.classes != self.num_classes) for one in samples]
        logits = head(self.mask_align(maps, [one.boxes for one in positive]))
        rules, side = self.rules, logits.shape[-1]
        wanted = [
            mask_targets(target, one, side, rules.aligned, rules.mask_threshold)
            for target, one in zip(targets, positive, strict=True)
        ]
        return mask_loss(logits, positive, wanted)

    # Test

    def detect(self, maps: Sequence[Tensor], sizes: Sizes, boxes: list[Tensor]) -> list[dict[str, Tensor]]:
        """Return the detections of each image, from proposals `boxes`, (n, 4) for each image."""
        counts = [len(mine) for mine in boxes]
        seen: list[Tensor] = []
        for number, stage in enumerate(self._stages()):
            logits, deltas = self._heads(stage, maps, boxes)
            seen.append(logits if self.rules.average == "logits" else logits.softmax(dim=1))
            if number + 1 < len(self.stages):
                classes = logits[:, :-1].argmax(dim=1)
                moved = _decoded(stage.coder, _of_class(deltas, classes), torch.cat(boxes))
                boxes = [clipped(mine, size) for mine, size in zip(torch.split(moved, counts), sizes, strict=True)]
        scores = torch.stack(seen).mean(dim=0)
        if self.rules.average == "logits":
            scores = scores.softmax(dim=1)
        final = _decoded(stage.coder, deltas.flatten(1), torch.cat(boxes)).reshape(*deltas.shape)
        found = [
            best_of_each_class(clipped(mine, size), probabilities[:, :-1], self.settings)
            for mine, probabilities, size in zip(
                torch.split(final, counts), torch.split(scores, counts), sizes, strict=True
            )
        ]
        return self._with_masks(maps, found) if len(self.masks) else found

    def _with_masks(self, maps: Sequence[Tensor], found: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        features = self.mask_align(maps, [one["boxes"] for one in found])
        classes = torch.cat([one["classes"] for one in found])
        rows = torch.arange(len(classes), device=classes.device)
        masks = torch.stack([head(features)[rows, classes].sigmoid() for head in self.masks]).mean(dim=0)
        parts = torch.split(masks, [len(one["boxes"]) for one in found])
        return [one | {"masks": mine} for one, mine in zip(found, parts, strict=True)]

    def _stages(self) -> list[Stage]:
        return list(cast(Any, self.stages))

    def _heads(self, stage: Stage, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        features = self.box_align(maps, boxes)
        if len(self.stages) > 1 and features.requires_grad:
            features.register_hook(lambda gradient: gradient * self.rules.features_gradient)
        logits, deltas = stage.heads(features)
        return logits, deltas


def _of_class(deltas: Tensor, classes: Tensor) -> Tensor:
    """Return the deltas (n, 4) of each box's class; all classes may share one set, (n, 1 or K, 4)."""
    rows = torch.arange(len(deltas), device=deltas.device)
    return deltas[rows, classes if deltas.shape[1] > 1 else torch.zeros_like(classes)]


def _decoded(coder: BoxCoder, deltas: Tensor, boxes: Tensor) -> Tensor:
    moved: Tensor = coder.decode_single(deltas, boxes)
    return moved


def _joined(samples: Sequence[Samples], targets: Sequence[Target]) -> Samples:
    """Join the boxes of all images, and number the objects of all images in one row."""
    before, objects = 0, []
    for one, target in zip(samples, targets, strict=True):
        objects.append(one.objects + before)
        before += len(target)
    joined = Samples(*(torch.cat(parts) for parts in zip(*samples, strict=True)))
    return joined._replace(objects=torch.cat(objects))
