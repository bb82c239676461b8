"""The implementations of the selective scan that are PyTorch's own operations, by what `choose_implementation` says."""

from collections.abc import Callable

from torch import Tensor

from ssmpretrain.kernels.selective_scan.chunked import selective_scan_chunked
from ssmpretrain.kernels.selective_scan.reference import selective_scan_reference
from ssmpretrain.kernels.selective_scan.traced import selective_scan_traced

PLAIN_SCANS: dict[str, Callable[..., Tensor | tuple[Tensor, Tensor]]] = {
    "chunked": selective_scan_chunked,
    "traced": selective_scan_traced,
    "reference": selective_scan_reference,
}
