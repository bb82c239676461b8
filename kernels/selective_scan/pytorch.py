"""The selective scans in PyTorch's own operations, by the name that `choose_implementation` gives."""

from collections.abc import Callable

from torch import Tensor

from ssmpretrain.kernels.selective_scan.chunked import scan_in_chunks
from ssmpretrain.kernels.selective_scan.exported import scan_for_export
from ssmpretrain.kernels.selective_scan.inputs import ScanInputs
from ssmpretrain.kernels.selective_scan.reference import scan_step_by_step

PyTorchScan = Callable[[ScanInputs], tuple[Tensor, Tensor]]
"""Returns y, (B, E, L), in u's dtype, and the last state, (B, E, N) or (B, G, E / G, N), as computed."""

PYTORCH_SCANS: dict[str, PyTorchScan] = {
    "chunked": scan_in_chunks,
    "exported": scan_for_export,
    "reference": scan_step_by_step,
}
