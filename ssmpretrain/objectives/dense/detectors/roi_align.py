"""RoIAlign on the maps of a pyramid, with scales that are given, not guessed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import box_area, roi_align

_WHOLE_OBJECT, _ITS_STRIDE = 224, 16  # a box of 224 pixels reads the map of stride 16


class PyramidAlign(nn.Module):
    """Read features of boxes, of side x side positions each, from the map whose stride suits their size.

    A box of s pixels (the root of its area) reads the map of stride 16 * 2^floor(log2(s / 224)), or the nearest stride.

    Args:
        strides: Stride of each map in pixels, finest first, each twice the one before.
        side: Positions along a side.
        samples_per_bin: Samples along a side of each position; 0 takes as many as the map has.
        aligned: Whether boxes are shifted by half a position, so that positions are the centres of their cells.

    Source: Lin et al., "Feature Pyramid Networks" (arXiv:1612.03144), equation 1.
    """

    def __init__(self, strides: Sequence[int], side: int, samples_per_bin: int, aligned: bool) -> None:
        super().__init__()
        self.strides, self.side = list(strides), side
        self.samples_per_bin, self.aligned = samples_per_bin, aligned

    def levels(self, boxes: Tensor) -> Tensor:
        """Return the index of the map that each box (n, 4) reads, (n,), int64."""
        octave = torch.floor(torch.log2(box_area(boxes).sqrt() / _WHOLE_OBJECT + 1e-6))
        finest = math.log2(_ITS_STRIDE / self.strides[0])
        return (octave + finest).clamp(0, len(self.strides) - 1).long()

    def forward(self, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Return features (n, C, side, side) of the n boxes of all images.

        Args:
            maps: Maps (B, C, h, w), finest first; further maps are not read.
            boxes: Boxes of each image in pixels, B tensors (n_i, 4).
        """
        image = torch.cat([box.new_full((len(box), 1), number) for number, box in enumerate(boxes)])
        rows = torch.cat([image, torch.cat(list(boxes))], dim=1)
        levels = self.levels(rows[:, 1:])
        by_level = [torch.where(levels == level)[0] for level in range(len(self.strides))]
        features = [
            roi_align(
                features,
                rows[mine].to(features),
                self.side,
                spatial_scale=1 / stride,
                sampling_ratio=self.samples_per_bin,
                aligned=self.aligned,
            )
            for features, mine, stride in zip(maps, by_level, self.strides, strict=False)
        ]
        return torch.cat(features)[torch.cat(by_level).argsort()]
