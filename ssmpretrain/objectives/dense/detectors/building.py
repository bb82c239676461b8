"""Build the detector that the settings name."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.objectives.dense.detectors.match import Match
from ssmpretrain.objectives.dense.detectors.one_stage import OneStage
from ssmpretrain.objectives.dense.detectors.rcnn import RCNN
from ssmpretrain.objectives.dense.detectors.settings import Detector


def build_detector(settings: Detector, match: Match, num_classes: int, width: int, strides: Sequence[int]) -> nn.Module:
    """Build a detector on maps of equal width.

    Args:
        settings: Settings of the detector.
        match: Rules that differ between published implementations. RetinaNet and FCOS are torchvision's.
        num_classes: K, without the background.
        width: Channels of the maps.
        strides: Stride of each map in pixels, finest first, each twice the one before.

    Returns:
        A module. Its `forward(maps, sizes, targets)` returns losses; without targets it returns detections.

    Raises:
        UserError: If the detector does not exist by the rules of `match`.
    """
    if settings.kind.stages:
        return RCNN(width, strides, num_classes, settings, match)
    if match.name != "torchvision":
        raise UserError(
            f"Detection: {settings.name} is torchvision's; got model.match {match.name}. Set it to torchvision."
        )
    return OneStage(width, strides, num_classes, settings)
