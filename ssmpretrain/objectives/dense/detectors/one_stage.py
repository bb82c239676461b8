"""RetinaNet and FCOS of torchvision on maps of any encoder, with explicit strides and float32 boxes.

B images, K classes
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.retinanet import RetinaNet

from ssmpretrain.base.errors import UserError
from ssmpretrain.objectives.dense.detectors.exact_layers import ExactConv2d
from ssmpretrain.objectives.dense.detectors.matching import ObjectMatcher
from ssmpretrain.objectives.dense.detectors.proposals import Anchors
from ssmpretrain.objectives.dense.detectors.settings import Detector
from ssmpretrain.objectives.dense.detectors.targets import Target, has_area

_OCTAVES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))  # of RetinaNet's anchors, times 4 strides
_GROUPS = 32  # of FCOS's norms
_LOSSES = {"classification": "classes", "bbox_regression": "boxes", "bbox_ctrness": "centres"}


class OneStage(nn.Module):
    """Detector without proposals: torchvision's RetinaNet or FCOS.

    An object that overlaps no anchor of RetinaNet takes no anchor. In torchvision it takes all that overlap nothing.

    Args:
        width: Channels of the maps; FCOS needs a multiple of 32, at least 64.
        strides: Stride of each map in pixels.
        num_classes: K.
        settings: Settings of the detector: name, thresholds and number of detections.

    Source: Lin et al., "Focal Loss for Dense Object Detection" (arXiv:1708.02002); Tian et al., "FCOS"
        (arXiv:1904.01355).
    """

    def __init__(self, width: int, strides: Sequence[int], num_classes: int, settings: Detector) -> None:
        super().__init__()
        build = _retinanet if settings.name == "retinanet" else _fcos
        self.model = build(width, strides, num_classes, settings)
        del self.model.transform  # resizes and normalises images; ours are ready
        for part in (self.model.head.classification_head, self.model.head.regression_head):
            for name, layer in list(part.named_children()):
                if isinstance(layer, nn.Conv2d):  # the layers that predict
                    setattr(part, name, ExactConv2d.of(layer))

    def forward(
        self, maps: Sequence[Tensor], sizes: Sequence[tuple[int, int]], targets: Sequence[Target] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Return the losses if there are targets, otherwise the detections of each image; see `RCNN.forward`."""
        outputs = self.model.head(list(maps))
        anchors: list[Tensor] = self.model.anchor_generator.on(maps)
        counts = [len(one) for one in anchors]
        if targets is None:
            return self._detect(outputs, anchors, counts, sizes)
        objects = [{"boxes": one.boxes, "labels": one.classes} for one in targets]
        of_all: list[Any] = [objects, outputs, [torch.cat(anchors)] * len(objects)]
        if isinstance(self.model, FCOS):
            of_all.append(counts)
        return {_LOSSES[name]: loss for name, loss in self.model.compute_loss(*of_all).items()}

    def _detect(
        self,
        outputs: dict[str, Tensor],
        anchors: list[Tensor],
        counts: list[int],
        sizes: Sequence[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        by_map = {name: list(torch.split(output, counts, dim=1)) for name, output in outputs.items()}
        found = self.model.postprocess_detections(by_map, [anchors] * len(sizes), list(sizes))
        detections = []
        for one in found:
            keep = has_area(one["boxes"])
            parts = {"boxes": one["boxes"], "scores": one["scores"], "classes": one["labels"]}
            detections.append({name: part[keep] for name, part in parts.items()})
        return detections


def _retinanet(width: int, strides: Sequence[int], num_classes: int, settings: Detector) -> RetinaNet:
    # torchvision rounds the sides of the anchors down, and their corners to whole pixels
    sides = [[int(4 * stride * octave) for octave in _OCTAVES] for stride in strides]
    return RetinaNet(
        SimpleNamespace(out_channels=width),
        num_classes,
        anchor_generator=Anchors(sides, (0.5, 1.0, 2.0), strides, rounded=True),
        proposal_matcher=ObjectMatcher(0.5, 0.4, low_quality=True),
        **_thresholds(settings),
    )


def _fcos(width: int, strides: Sequence[int], num_classes: int, settings: Detector) -> FCOS:
    least = 2 * _GROUPS  # with one channel in a group, a map of one position would become 0, and torch refuses it
    if width % _GROUPS or width < least:
        raise UserError(
            f"Detection: fcos has norms of {_GROUPS} groups with two channels or more, so model.neck.width is a "
            f"multiple of {_GROUPS} and at least {least}; got {width}. "
            f"Set it to {max(width // _GROUPS * _GROUPS, least)}, say."
        )
    anchors = Anchors([[stride] for stride in strides], (1.0,), strides, rounded=True)
    backbone: Any = SimpleNamespace(out_channels=width)
    return FCOS(backbone, num_classes, anchor_generator=anchors, **_thresholds(settings))


def _thresholds(settings: Detector) -> dict[str, Any]:
    return {
        "score_thresh": settings.least_score,
        "nms_thresh": settings.most_overlap,
        "detections_per_img": settings.max_detections,
    }
