"""Pyramid of maps with equal width, between an encoder and a detector."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import (
    ExtraFPNBlock,
    FeaturePyramidNetwork,
    LastLevelMaxPool,
    LastLevelP6P7,
)

from ssmpretrain.objectives.dense.detectors.exact_layers import exact
from ssmpretrain.objectives.dense.detectors.settings import Neck


def build_neck(settings: Neck, channels: Sequence[int], strides: Sequence[int], one_stage: bool) -> nn.Module:
    """Build the pyramid between an encoder and a detector.

    Args:
        settings: Settings of the pyramid.
        channels, strides: Channels and stride of each map of the encoder, finest first.
        one_stage: Whether the detector has no proposals. It reads maps from stride 8.

    Returns:
        A module from the encoder's maps to maps of equal width. Its attribute `strides` names their strides, and the
        sides of images are multiples of its attribute `multiple`.

    Raises:
        UserError: If the encoder does not fit the pyramid.
    """
    return TopDown(channels, strides, settings.width, one_stage)


class TopDown(nn.Module):
    """Feature pyramid network with one or two coarser maps.

    Args:
        channels: Channels of each map of the encoder.
        strides: Stride of each map in pixels, finest first, each twice the one before.
        width: Channels of the maps that it returns.
        one_stage: Whether the detector has no proposals: two coarser maps by convolutions instead of one by
            subsampling.

    Attributes:
        strides: Stride of each map that it returns.

    Source: Lin et al., "Feature Pyramid Networks for Object Detection" (arXiv:1612.03144).
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], width: int, one_stage: bool) -> None:
        super().__init__()
        extra: ExtraFPNBlock = LastLevelP6P7(width, width) if one_stage else LastLevelMaxPool()
        self.pyramid = FeaturePyramidNetwork(list(channels), width, extra)
        coarsest = strides[-1]
        self.multiple = coarsest
        self.strides = [*strides, 2 * coarsest, *([4 * coarsest] if one_stage else [])]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return maps (B, width, h, w), float32, finest first, of the encoder's maps (B, C, h, w)."""
        named = {str(number): features for number, features in enumerate(maps)}
        return [exact(features) for features in self.pyramid(named).values()]
