"""Transforms of `torch.func`, forward mode, second derivatives and tracing, as far as kernels must know of them.

A kernel computes its value and its gradient. A tensor with a tangent, or one that `torch.func` has wrapped, would lose
its other derivatives in a kernel, so `choose_implementation` sends it to PyTorch's own operations, which have them all.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ssmpretrain.base.errors import UserError


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # a graph is guarded by its transforms
def inside_transform() -> bool:
    """Return whether a transform or forward mode is active, no matter which tensors it has wrapped.

    Inside a transform, a checkpoint or an `autograd.Function` without rules of its own raises, even on tensors that are
    not wrapped. `vmap` over one weight, for example, wraps neither the other weights nor the input.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_jit_tracing() -> bool:
    """Return whether `torch.jit.trace` is running the code. Its graph must not depend on whether gradients are on."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def check_kept(where: str, kept: bool) -> None:
    """Raise if an operator that kept nothing for gradients is differentiated, as in a graph made without them."""
    if not kept:
        raise UserError(
            f"{where}: this graph was made without gradients and keeps nothing for them; got one to compute. "
            f"Make it with gradients, or run it under torch.no_grad()."
        )


def register_gradient_op(where: str, op: Any) -> None:
    """Register the derivative and the `vmap` rule of the operator that computes a kernel's gradients.

    A second derivative raises. `vmap` calls the operator once for each entry of a batch of output gradients.

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
