"""What stands between two blocks of a residual network: the residual sum with stochastic depth, and the next norm."""

from ssmpretrain.kernels.add_norm.api import add_norm
from ssmpretrain.kernels.add_norm.reference import add_norm_reference

__all__ = ["add_norm", "add_norm_reference"]
