"""Tracing by `torch.fx`: modules that become one node of a graph, and errors for parts that cannot be traced.

torchvision, timm and quantisation trace encoders with `torch.fx`. It traces without values and shapes, but some modules
read them, so each of these modules becomes one node. A function becomes one node by `torch.fx.wrap`.
"""

from typing import Any

from torch.fx import Proxy

from ssmpretrain.base.errors import UserError


class NotScriptable:
    """Mixin of encoders that `torch.jit.script` cannot compile: it raises an error that names the alternatives."""

    def __prepare_scriptable__(self) -> Any:  # torch.jit.script calls this method first
        raise UserError(
            f"{type(self).__name__}: torch.jit.script cannot compile it. Use torch.jit.trace, torch.compile, or "
            f"save_encoder with format='torch_export'."
        )


def one_node(module: Any, x: Proxy, *others: Any) -> Any:
    """Add a call of a module to the graph that `torch.fx` is tracing, as one node.

    A module's `forward` returns it when `x` is a `Proxy`, before anything reads a shape or a dtype.

    Args:
        module: The module, a part of the traced one.
        x: The first input of the module.
        others: Further inputs of the module.

    Returns:
        The proxy of the module's output.
    """
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(module), (x, *others), {})  # type: ignore[attr-defined]


def refuse_tracing(where: str, x: Any, what: str) -> None:
    """Raise a ValueError if `torch.fx` is tracing a part of an encoder that a graph cannot hold.

    Args:
        where: Name of the traced module, for the message.
        x: An input of the module. While `torch.fx` traces, this is a `Proxy` instead of a tensor.
        what: The part that cannot be traced, for the message.

    Raises:
        ValueError: If x is a `Proxy`.
    """
    if isinstance(x, Proxy):
        raise UserError(f"{where}: torch.fx cannot trace {what}. Use forward_intermediates or torch.export.")
