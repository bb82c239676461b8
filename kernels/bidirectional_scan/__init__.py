"""The core of Vim's mixer: convolution, projections and selective scan in both directions, gated.

`api` is the contract, `reference` the definition, `op` the operator, `cpu` and `triton` the launches. The folder
imports `selective_scan`, `causal_conv1d`, `dispatch`, `transforms`, `gpu`, `native` and the room `base`.
"""

from ssmpretrain.kernels.bidirectional_scan.api import bidirectional_scan
from ssmpretrain.kernels.bidirectional_scan.inputs import ScanDirection
from ssmpretrain.kernels.bidirectional_scan.reference import bidirectional_scan_reference

__all__ = ["ScanDirection", "bidirectional_scan", "bidirectional_scan_reference"]
