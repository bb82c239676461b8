"""Linear head: one classifier on one map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ssmpretrain.objectives.dense.heads.head import Head, classifier


@dataclass
class Linear(Head):
    """Settings of the linear head, which has none: logits of a position are linear in its features.

    The head reads one map, by default the last. A pyramid's last map is coarse; `taps.indices: [2]` gives its third.
    """

    reads_pyramid: ClassVar[bool] = False

    def build(self, channels: Sequence[int], num_classes: int) -> nn.Module:
        return LinearHead(channels[0], num_classes)


class LinearHead(nn.Module):
    """Turn one map (B, C, h, w) into logits (B, K, h, w)."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.classifier = classifier(channels, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.classifier(maps[0])  # type: ignore[no-any-return]
