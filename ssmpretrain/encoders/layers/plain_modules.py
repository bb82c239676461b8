"""Checks for fused passes, which read the weight of a module instead of calling the module.

Adapters (LoRA), quantisation, parametrisations and hooks take effect when a module is called. If a module has one of
them, the encoder calls its modules one after the other and runs no fused pass.
"""

from typing import Any

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_plain(module: nn.Module, kind: type[nn.Module], *, bias: bool = False) -> bool:
    """Return whether a fused pass may read the weight of a module, and its bias, instead of calling the module.

    Args:
        module: Module of the encoder.
        kind: Class whose `forward` the fused pass computes.
        bias: Whether the fused pass reads a bias. The module must have a bias if True, and none if False.
    """
    weight: Any = module._parameters.get("weight")
    has_bias = getattr(module, "bias", None) is not None
    if weight is None or has_bias != bias or is_traceable_wrapper_subclass(weight):
        return False
    return is_called_plainly(module, kind)


def is_called_plainly(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a call of the module runs `kind.forward` and no hook of the module.

    Global hooks, which act on all modules of the process (FLOP counters use them), are not checked.
    """
    return (
        type(module).forward is kind.forward
        and "forward" not in module.__dict__
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
    )
