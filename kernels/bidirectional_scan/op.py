"""What PyTorch must know about the bidirectional scan: its operators, shapes, gradients and FLOPs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ssmpretrain.kernels.bidirectional_scan import cpu


@torch.library.custom_op("ssmpretrain::bidirectional_scan", mutates_args=(), device_types="cpu")
def bidirectional_scan_op(
    xz: Tensor, parameters: Sequence[Tensor], divide_output: bool, keep_states: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return cpu.forward(xz, parameters, divide_output, keep_states)


@bidirectional_scan_op.register_fake
def _(
    xz: Tensor, parameters: Sequence[Tensor], divide_output: bool, keep_states: bool
) -> tuple[Tensor, Tensor, Tensor]:
    out = xz.new_empty(*xz.shape[:2], xz.shape[2] // 2)
    x_dbl = xz.new_empty(cpu.x_dbl_shape(xz, parameters), dtype=torch.float32)
    states = xz.new_empty(cpu.num_state_floats(xz, parameters) if keep_states else 0, dtype=torch.float32)
    return out, x_dbl, states


@torch.library.custom_op("ssmpretrain::bidirectional_scan_backward", mutates_args=(), device_types="cpu")
def bidirectional_scan_backward_op(
    dout: Tensor, x_dbl: Tensor, states: Tensor, xz: Tensor, parameters: Sequence[Tensor], divide_output: bool
) -> list[Tensor]:
    return cpu.backward(dout, x_dbl, states, xz, parameters, divide_output)


@bidirectional_scan_backward_op.register_fake
def _(
    dout: Tensor, x_dbl: Tensor, states: Tensor, xz: Tensor, parameters: Sequence[Tensor], divide_output: bool
) -> list[Tensor]:
    return [xz.new_empty(xz.shape), *(p.new_empty(p.shape) for p in parameters)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    xz, parameters, ctx.divide_output, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], xz, *parameters)


def _backward(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Tensor | None, list[Tensor | None], None, None]:
    x_dbl, states, xz, *parameters = ctx.saved_tensors
    if dout is None:
        return None, [None] * len(parameters), None, None
    dxz, *gradients = bidirectional_scan_backward_op(dout, x_dbl, states, xz, parameters, ctx.divide_output)
    return dxz, gradients, None, None


bidirectional_scan_op.register_autograd(_backward, setup_context=_setup_context)


def _work(xz_shape: torch.Size, parameters_shape: Sequence[torch.Size]) -> tuple[int, int, int, int]:
    """Return the FLOPs of convolution, x_proj and dt_proj, and the number of state updates, over all directions."""
    tokens = xz_shape[0] * xz_shape[1] * (len(parameters_shape) // 7)
    conv_weight, _, x_proj, dt_proj, _, A, _ = parameters_shape[:7]
    return (
        2 * tokens * conv_weight.numel(),
        2 * tokens * x_proj.numel(),
        2 * tokens * dt_proj.numel(),
        tokens * A.numel(),
    )


@register_flop_formula(torch.ops.ssmpretrain.bidirectional_scan)
def _flops(xz_shape: torch.Size, parameters_shape: Sequence[torch.Size], *_: Any, **__: Any) -> int:
    conv, x_proj, dt_proj, updates = _work(xz_shape, parameters_shape)
    return conv + x_proj + dt_proj + 9 * updates  # 9 per state as in selective_scan


@register_flop_formula(torch.ops.ssmpretrain.bidirectional_scan_backward)
def _backward_flops(
    dout_shape: torch.Size,
    x_dbl_shape: torch.Size,
    states_shape: torch.Size,
    xz_shape: torch.Size,
    parameters_shape: Sequence[torch.Size],
    *_: Any,
    **__: Any,
) -> int:
    conv, x_proj, dt_proj, updates = _work(xz_shape, parameters_shape)
    # a product's backward is two products; convolution, step size and scan are also computed again
    return 3 * conv + 2 * x_proj + 3 * dt_proj + (9 + 14) * updates
