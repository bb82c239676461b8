"""Layers that compute in float32 under autocast, because a box at 1300 pixels needs more digits than bfloat16 has."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def exact(features: Tensor) -> Tensor:
    """Return features in float32 if they have fewer digits."""
    return features.float() if features.dtype in (torch.bfloat16, torch.float16) else features


class ExactLinear(nn.Linear):
    """A linear layer that computes in the precision of its weights, also under autocast."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.to(self.weight.dtype), self.weight, self.bias)


class ExactConv2d(nn.Conv2d):
    """A convolution that computes in the precision of its weights, also under autocast."""

    @classmethod
    def of(cls, conv: nn.Conv2d) -> ExactConv2d:
        """Return a layer with the sizes and the parameters of a square convolution."""
        size, stride, padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
        layer = cls(conv.in_channels, conv.out_channels, size, stride, padding, device="meta")
        layer.weight, layer.bias = conv.weight, conv.bias
        return layer

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.to(self.weight.dtype))
