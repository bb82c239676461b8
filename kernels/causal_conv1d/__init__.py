"""Mamba's short depthwise convolution with its SiLU, in one or both directions of a sequence.

`api` is the contract, `reference` the definition, `op` the operator, `triton` the launch on a GPU. The folder imports
`dispatch`, `transforms`, `gpu` and the room `base`.
"""

from ssmpretrain.kernels.causal_conv1d.api import bidirectional_causal_conv1d, causal_conv1d
from ssmpretrain.kernels.causal_conv1d.reference import bidirectional_causal_conv1d_reference, causal_conv1d_reference

__all__ = [
    "bidirectional_causal_conv1d",
    "bidirectional_causal_conv1d_reference",
    "causal_conv1d",
    "causal_conv1d_reference",
]
