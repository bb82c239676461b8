"""The selective scan of Mamba (S6), one direction over one sequence."""

from ssmpretrain.kernels.dispatch import Impl
from ssmpretrain.kernels.selective_scan.api import selective_scan
from ssmpretrain.kernels.selective_scan.reference import selective_scan_reference

__all__ = ["Impl", "selective_scan", "selective_scan_reference"]
