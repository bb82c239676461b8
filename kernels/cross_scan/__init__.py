"""The scans of VMamba: read a map along several routes, scan each sequence, add the results on the map.

`api` is the contract, `reference` the definition, `op` the operator, `cpu`, `triton` and `triton_one_state` the
launches; `routes` are the orders of a map and `orders` those of some positions, which `packed` scans. It imports
`selective_scan`, `dispatch`, `transforms`, `gpu`, `native` and the room `base`.
"""

from ssmpretrain.kernels.cross_scan.api import cross_selective_scan
from ssmpretrain.kernels.cross_scan.orders import PackedOrder, packed_orders
from ssmpretrain.kernels.cross_scan.packed import packed_cross_selective_scan
from ssmpretrain.kernels.cross_scan.reference import cross_selective_scan_reference
from ssmpretrain.kernels.cross_scan.routes import MODES, Mode
from ssmpretrain.kernels.cross_scan.sequences import cross_merge, cross_scan

__all__ = [
    "MODES",
    "Mode",
    "PackedOrder",
    "cross_merge",
    "cross_scan",
    "cross_selective_scan",
    "cross_selective_scan_reference",
    "packed_cross_selective_scan",
    "packed_orders",
]
