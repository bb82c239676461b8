"""What the kernels leave to plain PyTorch: the transforms of `torch.func`, forward mode and second derivatives.

A kernel knows its value and its gradient. A tensor with a tangent, or one that `torch.func` has wrapped, would lose
what it carries there, so `choose_implementation` sends it to PyTorch's own operations, which know all derivatives.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ssmpretrain.base.errors import UserError


def is_transformed(tensors: Iterable[Tensor | None]) -> bool:
    """Return whether a tensor has a tangent (forward mode) or belongs to a transform: grad, vmap, jvp and the like.

    While `torch.compile` traces, every tensor inside a transform counts.
    """
    if torch.compiler.is_dynamo_compiling():
        return bool(inside_transform())
    is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return any(t is not None and (is_wrapped(t) or _has_tangent(t)) for t in tensors)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # a graph is guarded by its transforms
def inside_transform() -> bool:
    """Return whether a transform or forward mode is active, whatever it has wrapped.

    There an `autograd.Function` without rules of its own and a checkpoint raise even on tensors that carry nothing:
    `vmap` over one weight leaves the others, and what comes before it, as they were.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_jit_tracing() -> bool:
    """Return whether `torch.jit.trace` is running the code, whose graph shall not depend on gradients being on."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def check_kept(where: str, kept: bool) -> None:
    """Raise where gradients are asked of an operator that was called, by a graph, to keep nothing for them."""
    if not kept:
        raise UserError(
            f"{where}: this graph was made without gradients and keeps nothing for them; got one to compute. "
            f"Make it with gradients, or run it under torch.no_grad()."
        )


def register_gradient_op(where: str, op: Any) -> None:
    """Tell PyTorch what it may do with the operator that computes a kernel's gradients.

    To differentiate these once more raises. `vmap` runs the operator once for each entry of a batch of output
    gradients.

    Args:
        where: The operation's name, which opens the message.
        op: The operator.
    """

    def backward(*_: Any) -> None:
        raise UserError(
            f"{where}: a kernel has first derivatives; got a second one to compute. Use the transforms of torch.func "
            f"(grad of grad, hessian, jvp), which run plain PyTorch, or impl='reference'."
        )

    op.register_autograd(backward)
    op.register_vmap(partial(_one_by_one, op))


def _one_by_one(op: Any, info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
    results = [
        op(*(_entry(argument, dim, i) for argument, dim in zip(arguments, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    as_given = type(results[0])
    stacked = [torch.stack(parts) for parts in zip(*results, strict=True)]
    return as_given(stacked), as_given([0] * len(stacked))


def _entry(argument: Any, dim: Any, i: int) -> Any:
    if dim is None:
        return argument
    if isinstance(argument, Tensor):
        return argument.select(dim, i)
    return [_entry(one, its_dim, i) for one, its_dim in zip(argument, dim, strict=True)]
