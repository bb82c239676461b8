"""Checks that a fused pass may take a module's weight and leave the module out.

Adapters (LoRA), quantisation, parametrisations and hooks all act where a module is called. Where one of them is in
place, an encoder calls its modules one after the other.
"""

from typing import Any

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_plain(module: nn.Module, kind: type[nn.Module], *, bias: bool = False) -> bool:
    """Return whether a module computes exactly what `kind` does with its weight, and its bias if it should have one.

    Args:
        module: Module of the encoder.
        kind: Class for which the fused pass takes it.
        bias: Whether the fused pass reads a bias.
    """
    weight: Any = module._parameters.get("weight")
    has_bias = getattr(module, "bias", None) is not None
    if weight is None or has_bias != bias or is_traceable_wrapper_subclass(weight):
        return False
    return is_called_plainly(module, kind)


def is_called_plainly(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether to call a module is to run `kind.forward`: no other forward, and no hook on this module.

    Hooks on all modules of the process, with which FLOPs are counted, do not matter.
    """
    return (
        type(module).forward is kind.forward
        and "forward" not in module.__dict__
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
    )
