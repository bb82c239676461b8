"""Tracing by `torch.fx`: modules that become one node of a graph.

torchvision, timm and quantisation trace encoders so. `torch.fx` traces without numbers and shapes, at which these
modules look. Functions become nodes by `torch.fx.wrap`.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch.fx import Proxy

from ssmpretrain.base.errors import UserError


class NotScriptable:
    """An encoder that `torch.jit.script` does not compile."""

    def __prepare_scriptable__(self) -> Any:  # which torch.jit.script calls first
        raise UserError(
            f"{type(self).__name__}: torch.jit.script cannot compile it. Use torch.jit.trace, torch.compile, or "
            f"save_encoder with format='torch_export'."
        )


def one_node(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let the module whose `forward` this decorates be a node of a graph that is being traced."""

    @wraps(forward)
    def run(self: Any, x: Any, *others: Any) -> Any:
        if isinstance(x, Proxy):
            return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x, *others), {})  # type: ignore[attr-defined]
        return forward(self, x, *others)

    return run


def refuse_tracing(where: str, x: Any, what: str) -> None:
    """Raise if a graph is being traced of something that it would freeze or could not hold.

    Args:
        where: Name of the traced module, for the message.
        x: An input, a tensor unless a graph is being traced.
        what: The part that cannot be traced, for the message.

    Raises:
        ValueError: If x stands for a tensor of a graph.
    """
    if isinstance(x, Proxy):
        raise UserError(f"{where}: torch.fx cannot trace {what}. Use forward_intermediates or torch.export.")
