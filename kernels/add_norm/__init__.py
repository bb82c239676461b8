"""The residual sum between two blocks, with stochastic depth, and the norm that follows it.

`api` is the contract, `reference` the definition, `op` the operator, `triton` the launch on a GPU; `rows` is the norm
alone on a CPU. The folder imports `dispatch`, `layouts`, `transforms`, `gpu`, `native` and the room `base`.
"""

from ssmpretrain.kernels.add_norm.api import add_norm
from ssmpretrain.kernels.add_norm.reference import add_norm_reference

__all__ = ["add_norm", "add_norm_reference"]
