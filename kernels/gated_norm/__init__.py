"""The gated norm of Mamba-2: gate, RMS norm and weight in one pass.

`api` is the contract, `reference` the definition, `op` the operator, `cpu` and `triton` the launches. The folder
imports `dispatch`, `layouts`, `transforms`, `gpu`, `native` and the room `base`.
"""

from ssmpretrain.kernels.gated_norm.api import gated_rms_norm
from ssmpretrain.kernels.gated_norm.reference import gated_rms_norm_reference

__all__ = ["gated_rms_norm", "gated_rms_norm_reference"]
