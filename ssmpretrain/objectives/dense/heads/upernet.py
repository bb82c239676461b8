"""UPerNet: pooling over the coarsest map, a top-down path, and a fusion of all maps.

Legend: B images, C_i channels of map i, C channels of the head, K classes, h_i x w_i size of map i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.objectives.dense.heads.head import Head, check_sizes, classifier, conv_norm_relu


@dataclass
class UPerNet(Head):
    """Settings of UPerNet, the head of the published segmentation results of VMamba, Swin and ConvNeXt.

    Batch normalisation is synchronised over all GPUs of a run, as published. On CPUs each process has its own.

    Args:
        channels: Channels C of all convolutions, at least 1. Published: 512; for Vim 192 (tiny) and 384 (small).
        pool_sizes: Sides of the grids that the coarsest map is averaged to, each at least 1.
        dropout: Probability that a channel is dropped before the classifier, in [0, 1).

    Source: Xiao et al., "Unified Perceptual Parsing for Scene Understanding" (arXiv:1807.10221), with the layers of
        `UPerHead` in mmsegmentation 1.2.2.
    """

    channels: int = 512
    pool_sizes: tuple[int, ...] = (1, 2, 3, 6)
    dropout: float = 0.1

    def __post_init__(self) -> None:
        self.pool_sizes = tuple(self.pool_sizes)  # a checkpoint or a recipe gives a list
        check_sizes("UPerNet", self.dropout, channels=self.channels)
        if not self.pool_sizes or min(self.pool_sizes) < 1:
            raise UserError(
                f"UPerNet: pool_sizes are one or more, each at least 1; got {list(self.pool_sizes)}. "
                "[1, 2, 3, 6] is usual."
            )

    def build(self, channels: Sequence[int], num_classes: int) -> nn.Module:
        return UPerNetHead(channels, num_classes, self)


class UPerNetHead(nn.Module):
    """Turn maps (B, C_i, h_i, w_i), finest first, into logits (B, K, h_0, w_0); see `UPerNet`."""

    def __init__(self, channels: Sequence[int], num_classes: int, settings: UPerNet) -> None:
        super().__init__()
        C, (*finer, coarsest) = settings.channels, channels
        self.pooling = PyramidPooling(coarsest, C, settings.pool_sizes)
        self.laterals = nn.ModuleList(conv_norm_relu(inputs, C, 1) for inputs in finer)
        self.outputs = nn.ModuleList(conv_norm_relu(C, C, 3) for _ in finer)
        self.fusion = conv_norm_relu(len(channels) * C, C, 3)
        self.dropout = nn.Dropout2d(settings.dropout)
        self.classifier = classifier(C, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        coarsest = self.pooling(maps[-1])
        sums = [coarsest]  # finest first, as maps
        for lateral, features in zip(reversed(self.laterals), reversed(maps[:-1]), strict=True):
            inner = lateral(features)
            sums.insert(0, inner + resized(sums[0], inner))
        levels = [output(one) for output, one in zip(self.outputs, sums[:-1], strict=True)]
        fused = self.fusion(torch.cat([resized(one, maps[0]) for one in (*levels, coarsest)], dim=1))
        return self.classifier(self.dropout(fused))  # type: ignore[no-any-return]


class PyramidPooling(nn.Module):
    """Join a map with its means over the cells of coarse grids: (B, C_i, h, w) to (B, C, h, w).

    Source: Zhao et al., "Pyramid Scene Parsing Network" (arXiv:1612.01105), section 3.2.
    """

    def __init__(self, inputs: int, channels: int, pool_sizes: Sequence[int]) -> None:
        super().__init__()
        self.pool_sizes = tuple(pool_sizes)
        self.cells = nn.ModuleList(conv_norm_relu(inputs, channels, 1) for _ in pool_sizes)
        self.bottleneck = conv_norm_relu(inputs + len(pool_sizes) * channels, channels, 3)

    def forward(self, features: Tensor) -> Tensor:
        pooled = [
            resized(conv(F.adaptive_avg_pool2d(features, size)), features)
            for size, conv in zip(self.pool_sizes, self.cells, strict=True)
        ]
        return self.bottleneck(torch.cat([features, *pooled], dim=1))  # type: ignore[no-any-return]


def resized(features: Tensor, like: Tensor) -> Tensor:
    """Return a map (B, C, h, w) resized bilinearly to the height and width of another map."""
    return F.interpolate(features, like.shape[-2:], mode="bilinear", align_corners=False)
