"""FCN: one 3 x 3 convolution and a classifier on one of several maps, the auxiliary head of UPerNet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.objectives.dense.heads.head import check_sizes, classifier, conv_norm_relu


@dataclass
class FCN:
    """Settings of the auxiliary head. It adds a loss in training and is not used afterwards.

    Args:
        channels: Channels of the convolution, at least 1.
        map: Number of the map that the head reads, from 0 for the finest; negative numbers count from the end.
            Published: the third of four.
        weight: Factor of its loss, above 0. Published: 0.4.
        dropout: Probability that a channel is dropped before the classifier, in [0, 1).

    Source: Long et al., "Fully Convolutional Networks for Semantic Segmentation" (arXiv:1411.4038), with the layers of
        `FCNHead` in mmsegmentation 1.2.2.
    """

    channels: int = 256
    map: int = 2
    weight: float = 0.4
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_sizes("FCN", self.dropout, channels=self.channels)
        if not 0 < self.weight < math.inf:
            raise UserError(
                f"FCN: weight is finite and above 0; got {self.weight}. Set model.auxiliary to null for no such head."
            )

    def build(self, channels: Sequence[int], num_classes: int) -> nn.Module:
        """Build the head. It turns a list of maps (B, C_i, h_i, w_i) into logits (B, K, h, w) at the size of one."""
        if len(channels) == 1 and self.map not in (0, -1):
            raise UserError(
                f"FCN: the head reads one map, numbered 0, and the auxiliary head can read that alone; got map "
                f"{self.map}, as of the four maps of UPerNet. Set model.auxiliary to null, or model.auxiliary.map to 0."
            )
        if not -len(channels) <= self.map < len(channels):
            raise UserError(
                f"FCN: map is one of {len(channels)} maps, numbered from 0; got {self.map}. Set model.auxiliary.map."
            )
        return FCNHead(channels, num_classes, self)


class FCNHead(nn.Module):
    """Turn one of several maps into logits; see `FCN`."""

    def __init__(self, channels: Sequence[int], num_classes: int, settings: FCN) -> None:
        super().__init__()
        self.map = settings.map
        self.conv = conv_norm_relu(channels[settings.map], settings.channels, 3)
        self.dropout = nn.Dropout2d(settings.dropout)
        self.classifier = classifier(settings.channels, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.classifier(self.dropout(self.conv(maps[self.map])))  # type: ignore[no-any-return]
