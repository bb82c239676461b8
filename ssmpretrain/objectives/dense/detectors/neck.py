"""Pyramid of maps with equal width, between an encoder and a detector.

s stride of an encoder whose maps have one stride
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import (
    ExtraFPNBlock,
    FeaturePyramidNetwork,
    LastLevelMaxPool,
    LastLevelP6P7,
)

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.features.necks import SimpleFeaturePyramid
from ssmpretrain.objectives.dense.detectors.exact_layers import exact
from ssmpretrain.objectives.dense.detectors.settings import Neck

FINEST_OF_ONE_STAGE = 8  # pixels; RetinaNet and FCOS read no finer map


def build_neck(
    settings: Neck, channels: Sequence[int], strides: Sequence[int], one_stage: bool
) -> TopDown | FromOneMap:
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
    one_stride = len(set(strides)) == 1
    name = settings.name if settings.name != "auto" else "simple_pyramid" if one_stride else "fpn"
    if name == "simple_pyramid":
        if len(strides) > 1:
            raise UserError(
                f"Detection: simple_pyramid reads one map; got {len(strides)}, with strides {list(strides)}. "
                + (
                    "Name one block in model.taps.indices, or leave it out."
                    if one_stride
                    else "Set model.neck.name to fpn or auto."
                )
            )
        return FromOneMap(channels[0], strides[0], settings.width, one_stage)
    if one_stride or any(coarse != 2 * fine for fine, coarse in pairwise(strides)):
        raise UserError(
            f"Detection: fpn reads maps whose strides double, as 4, 8, 16, 32; got {list(strides)}. "
            + (
                "Set model.neck.name to simple_pyramid or auto."
                if one_stride
                else "Name all stages in model.taps.indices."
            )
        )
    if one_stage and strides[0] < FINEST_OF_ONE_STAGE:
        raise UserError(
            f"Detection: retinanet and fcos read maps from stride {FINEST_OF_ONE_STAGE}; got {list(strides)}. Leave "
            "model.taps.indices out, or the finest stages in it."
        )
    return TopDown(channels, strides, settings.width, one_stage)


class TopDown(nn.Module):
    """Feature pyramid network with one or two coarser maps.

    Args:
        channels: Channels of each map of the encoder.
        strides: Stride of each map in pixels, finest first, each twice the one before.
        width: Channels of the maps that it returns.
        one_stage: Whether the detector has no proposals: two coarser maps by convolutions, not one by subsampling.

    Attributes:
        strides: Stride in pixels of each map that it returns.
        multiple: The coarsest stride of the encoder.

    Source: Lin et al., "Feature Pyramid Networks for Object Detection" (arXiv:1612.03144).
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], width: int, one_stage: bool) -> None:
        super().__init__()
        extra: ExtraFPNBlock = LastLevelP6P7(width, width) if one_stage else LastLevelMaxPool()
        self.pyramid = FeaturePyramidNetwork(list(channels), width, extra)
        self.multiple: int = strides[-1]
        coarser = (2, 4) if one_stage else (2,)
        self.strides: list[int] = [*strides, *(factor * strides[-1] for factor in coarser)]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return maps (B, width, h, w), float32, finest first, of the encoder's maps (B, C, h, w)."""
        named = {str(number): features for number, features in enumerate(maps)}
        return [exact(features) for features in self.pyramid(named).values()]


class FromOneMap(nn.Module):
    """ViTDet's pyramid of one map: strides s/4 to 4s, or those from 8 pixels on and one of 8s.

    Args:
        channels: Channels of the map.
        stride: s in pixels.
        width: Channels of the maps that it returns.
        one_stage: Whether the detector has no proposals: maps from stride 8 alone, and one coarser map.

    Attributes:
        strides: Stride in pixels of each map that it returns.
        multiple: 2s, so that every map covers the same pixels.

    Source: Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection" (arXiv:2203.16527), sec. 3.
    """

    def __init__(self, channels: int, stride: int, width: int, one_stage: bool) -> None:
        super().__init__()
        self.pyramid = SimpleFeaturePyramid(channels, stride, width)
        self.multiple, self.strides = 2 * stride, list(self.pyramid.strides)
        self.has_coarser = one_stage
        if one_stage:
            skipped = sum(one < FINEST_OF_ONE_STAGE for one in self.strides)
            self.pyramid.levels, self.pyramid.outputs = self.pyramid.levels[skipped:], self.pyramid.outputs[skipped:]
            self.strides = [*self.strides[skipped:], 2 * self.strides[-1]]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return maps (B, width, h, w), float32, finest first, of a list with one map (B, C, h, w)."""
        pyramid = [exact(features) for features in self.pyramid(maps)]
        return [*pyramid, pyramid[-1][..., ::2, ::2]] if self.has_coarser else pyramid
