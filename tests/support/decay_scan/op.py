"""What PyTorch must know about the decaying sum: its operator, shapes, gradients and FLOPs."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


@torch.library.custom_op("outside::decay_scan", mutates_args=())
def decay_scan_op(x: Tensor, log_decay: Tensor, reverse: bool, impl: str) -> Tensor:
    if impl == "triton":
        from decay_scan import triton  # imported here: Triton need not be installed

        return triton.launch(x, log_decay, reverse)
    from decay_scan import cpu

    return cpu.launch(x, log_decay, reverse)


@decay_scan_op.register_fake
def _(x: Tensor, log_decay: Tensor, reverse: bool, impl: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, log_decay, ctx.reverse, ctx.impl = inputs
    ctx.save_for_backward(x, log_decay, output)


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None, None]:
    # y_t = a_t y_{t-1} + x_t  gives  dx_t = dy_t + a_{t+1} dx_{t+1}: the same sum, run the other way.
    # The row that roll wraps around meets the zero initial state, so its value is free.
    x, log_decay, y = ctx.saved_tensors
    decay_of_next = log_decay.roll(1 if ctx.reverse else -1, dims=1)
    grad_x = decay_scan_op(grad_y, decay_of_next, not ctx.reverse, ctx.impl)
    return grad_x, grad_x * (y - x), None, None


decay_scan_op.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.outside.decay_scan)
def _flops(x_shape: torch.Size, *_: Any, **__: Any) -> int:
    return 3 * x_shape.numel()  # exp, times, plus
