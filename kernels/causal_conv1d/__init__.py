"""Mamba's short depthwise convolution with its SiLU: causal, in both directions of a sequence, or centred.

`api` is the contract, `reference` the definition, `op` the operator, `cpu` and `triton` the launches. The folder
imports `dispatch`, `transforms`, `gpu`, `native` and the room `base`.
"""

from ssmpretrain.kernels.causal_conv1d.api import bidirectional_causal_conv1d, causal_conv1d, centred_conv1d
from ssmpretrain.kernels.causal_conv1d.reference import (
    bidirectional_causal_conv1d_reference,
    causal_conv1d_reference,
    centred_conv1d_reference,
)

__all__ = [
    "bidirectional_causal_conv1d",
    "bidirectional_causal_conv1d_reference",
    "causal_conv1d",
    "causal_conv1d_reference",
    "centred_conv1d",
    "centred_conv1d_reference",
]
