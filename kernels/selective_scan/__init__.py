"""The selective scan of Mamba (S6), one direction over one sequence.

`api` is the contract, `reference` the definition, `op` the operator, `cpu` and `triton` the launches; `pytorch` names
the scans in plain PyTorch. The folder imports `dispatch`, `transforms`, `gpu`, `native` and the room `base`.
"""

from ssmpretrain.kernels.dispatch import Impl
from ssmpretrain.kernels.selective_scan.api import selective_scan
from ssmpretrain.kernels.selective_scan.reference import selective_scan_reference

__all__ = ["Impl", "selective_scan", "selective_scan_reference"]
