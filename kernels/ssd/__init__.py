"""State-space duality (SSD), the scan of Mamba-2: one decay for each head, computed as matrix products over chunks.

`api` is the contract, `reference` the definition, `chunked` the matrix products in PyTorch, `op` the operator, `cpu`
and `triton` the launches; `cross` scans along the routes of a map. The folder imports `cross_scan`, `dispatch`,
`layouts`, `transforms`, `gpu`, `native` and the room `base`.
"""

from ssmpretrain.kernels.ssd.api import bidirectional_ssd, ssd
from ssmpretrain.kernels.ssd.cross import cross_ssd, packed_cross_ssd
from ssmpretrain.kernels.ssd.reference import ssd_reference

__all__ = ["bidirectional_ssd", "cross_ssd", "packed_cross_ssd", "ssd", "ssd_reference"]
