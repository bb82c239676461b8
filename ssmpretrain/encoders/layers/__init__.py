"""Layers that several families share: projections, norms, state-space initialisation, residual sums, torch.fx nodes.

This folder imports kernels and base.
"""

from ssmpretrain.encoders.layers.fx_tracing import NotScriptable, one_node, refuse_tracing
from ssmpretrain.encoders.layers.plain_modules import is_called_plainly, is_plain
from ssmpretrain.encoders.layers.projection import PROCESSOR, ProcessorTraits, Projection, linear
from ssmpretrain.encoders.layers.rms_norm import RMSNorm, rms_norm_linear
from ssmpretrain.encoders.layers.state_space import LayerNorm, add_branch, decay, init_decay, init_step_size, stream

__all__ = [
    "PROCESSOR",
    "LayerNorm",
    "NotScriptable",
    "ProcessorTraits",
    "Projection",
    "RMSNorm",
    "add_branch",
    "decay",
    "init_decay",
    "init_step_size",
    "is_called_plainly",
    "is_plain",
    "linear",
    "one_node",
    "refuse_tracing",
    "rms_norm_linear",
    "stream",
]
