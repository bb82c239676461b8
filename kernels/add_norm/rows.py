"""RMS norm of rows on the CPU in one pass each way, for callers that have a backward pass of their own."""

# M rows, D channels

import torch
from torch import Tensor

from ssmpretrain.kernels.native import library
from ssmpretrain.kernels.native.fields import float_bits, head_rows


@torch.library.custom_op("ssmpretrain::rms_norm_rows", mutates_args=())
def rms_norm_rows(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x r weight, (M, D), in a dtype, and r = 1 / sqrt(mean(x^2) + eps), (M, 1), float32.

    The operator has no derivative. It needs the native library.

    Args:
        x: (M, D), float32.
        weight: (D,), float32.
        eps: Added to the mean square.
        dtype: float32 or bfloat16.
    """
    x, weight = x.contiguous(), weight.contiguous()
    out, inverse = torch.empty_like(x, dtype=dtype), x.new_empty(len(x), 1)
    fields = (*x.shape, float_bits(eps), *head_rows(x), *head_rows(out), weight.data_ptr(), inverse.data_ptr())
    library.call("rms_norm", (*fields, *head_rows(None), *head_rows(None), 0))
    return out, inverse


@rms_norm_rows.register_fake
def _(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[0], 1)


@torch.library.custom_op("ssmpretrain::rms_norm_rows_backward", mutates_args=())
def rms_norm_rows_backward(
    grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, (M, D), and weight, (D,), float32, and the forward pass's output in a dtype.

    Args:
        grad: Gradient of the output, (M, D), float32.
        x, weight, dtype: As in the forward pass.
        inverse: r of the forward pass.
    """
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    out, dx, dweight = torch.empty_like(x, dtype=dtype), torch.empty_like(x), torch.empty_like(weight)
    fields = (*x.shape, 0, *head_rows(x), *head_rows(out), weight.data_ptr(), inverse.data_ptr())
    library.call("rms_norm_backward", (*fields, *head_rows(grad), *head_rows(dx), dweight.data_ptr()))
    return dx, dweight, out


@rms_norm_rows_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), x.new_empty(x.shape, dtype=dtype)
