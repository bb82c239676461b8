"""Mamba's short depthwise convolution with its SiLU, in one or both directions of a sequence."""

from ssmpretrain.kernels.causal_conv1d.api import bidirectional_causal_conv1d, causal_conv1d
from ssmpretrain.kernels.causal_conv1d.reference import bidirectional_causal_conv1d_reference, causal_conv1d_reference

__all__ = [
    "bidirectional_causal_conv1d",
    "bidirectional_causal_conv1d_reference",
    "causal_conv1d",
    "causal_conv1d_reference",
]
