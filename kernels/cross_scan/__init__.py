"""The scans of VMamba: a map read along several routes, scanned along each, and put back together."""

from ssmpretrain.kernels.cross_scan.api import cross_selective_scan
from ssmpretrain.kernels.cross_scan.packed import PackedOrder, packed_cross_selective_scan, packed_orders
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
