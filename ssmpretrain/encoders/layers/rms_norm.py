"""Root-mean-square norm, alone or fused with the projection that follows it.

    x_hat = x / sqrt(mean(x^2) + eps),   y = x_hat * weight

Source: Zhang & Sennrich, "Root Mean Square Layer Normalization" (arXiv:1910.07467), equation 4.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ssmpretrain.encoders.layers.fx_tracing import one_node
from ssmpretrain.encoders.layers.projection import linear as fast_linear
from ssmpretrain.encoders.layers.projection import product_dtype
from ssmpretrain.encoders.layers.state_space import compute_dtype
from ssmpretrain.kernels.add_norm import add_norm
from ssmpretrain.kernels.add_norm.rows import rms_norm_rows, rms_norm_rows_backward
from ssmpretrain.kernels.native import library
from ssmpretrain.kernels.transforms import inside_transform, is_jit_tracing


class RMSNorm(nn.Module):
    """Normalise tokens (..., D) and scale them by `weight` (D,).

    It computes in the dtype of the input and returns the dtype of the weight.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return one_node(self, x)  # type: ignore[no-any-return]
        return (x * inverse_rms(x, self.eps) * self.weight).to(self.weight.dtype)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """Compute 1 / sqrt(mean(x^2) + eps) of each token: (..., D) to (..., 1)."""
    # A vector norm reads x once and keeps nothing of its size; squaring first would write a copy.
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return (length.square() / x.shape[-1] + eps).rsqrt()


def rms_norm_linear(x: Tensor, norm: RMSNorm, linear: nn.Linear) -> Tensor:
    """Compute `linear(norm(x))`.

    On the CPU, save only `x` for backward and recompute the norm there. On CUDA the norm is one kernel, and its result,
    in the projection's dtype, is saved. Hooks of the two modules do not run. Under forward mode, `torch.func` and
    `torch.jit.trace` the function calls both modules instead.

    Args:
        x: (B, L, D), float32 or float64.
        norm: The norm.
        linear: A projection, with or without bias.

    Returns:
        (B, L, outputs), in the dtype of autocast if autocast is on, else in the dtype of the projection's weight.
    """
    return rms_norm_linear_parts(x, norm, linear, (linear.out_features,))[0]


def rms_norm_linear_parts(x: Tensor, norm: RMSNorm, linear: nn.Linear, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Compute `linear(norm(x)).split(sizes, -1)`, one product for each part.

    A product whose number of columns is a multiple of 16 is up to 1.5 times as fast as one of some columns more
    (measured with MKL on two cores of an AMD EPYC: 140 against 96 GFLOP/s for 896 and 902 columns). All else is as in
    `rms_norm_linear`.

    Args:
        x, norm, linear: As for `rms_norm_linear`.
        sizes: Numbers of columns, whose sum is the number of outputs.

    Returns:
        The parts, (B, L, size) each, contiguous.
    """
    if is_jit_tracing() or inside_transform():
        return torch.split(linear(norm(x)), list(sizes), dim=-1)
    weight, bias = linear.weight, linear.bias
    dtype = compute_dtype(x, weight)
    if not (x.is_cuda and x.dtype == torch.float32) and torch.is_grad_enabled():
        return _RMSNormLinear.apply(x, norm.weight, weight, bias, norm.eps, dtype, sizes)  # type: ignore[no-any-return, no-untyped-call]
    if x.is_cuda and x.dtype == torch.float32:
        normed, _ = add_norm(x, None, norm.weight, eps=norm.eps, out_dtype=dtype)
    else:
        normed = _normed(x, norm.weight, norm.eps, dtype)[0]
    return _products(normed, weight.to(dtype), None if bias is None else bias.to(dtype), sizes)


def _products(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Compute one product of x for each part of the weight's rows."""
    biases = [None] * len(sizes) if bias is None else torch.split(bias, list(sizes))
    return tuple(
        fast_linear(x, part, shift) for part, shift in zip(torch.split(weight, list(sizes)), biases, strict=True)
    )


def _normed(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the normed tokens in a dtype, and 1 / deviation of each token, (..., 1)."""
    if _is_native(x, weight, dtype):
        out, inverse = rms_norm_rows(x.flatten(0, -2), weight, eps, dtype)
        return out.view(x.shape), inverse.view(*x.shape[:-1], 1)
    inverse = inverse_rms(x, eps)
    return x.mul(inverse).mul_(weight).to(dtype), inverse


def _is_native(x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Return whether the native library computes the norm. While `torch.export` traces it does not."""
    if x.device.type != "cpu" or torch.compiler.is_exporting() or x.numel() == 0:
        return False
    float32 = x.dtype == weight.dtype == torch.float32 and dtype in (torch.float32, torch.bfloat16)
    return float32 and library.is_available()


class _RMSNormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        dtype: torch.dtype,
        sizes: tuple[int, ...],
    ) -> tuple[Tensor, ...]:
        normed, scale = _normed(x, norm_weight, eps, dtype)
        ctx.save_for_backward(x, scale, norm_weight, weight, bias)
        ctx.eps, ctx.dtype, ctx.sizes = eps, dtype, sizes
        return _products(normed, weight.to(dtype), None if bias is None else bias.to(dtype), sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # With g = d loss / d (x_hat * w):  d w = sum g x_hat,  d x = scale * (g w - x_hat * mean(g w x_hat)).
        x, scale, norm_weight, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative the gradient is a graph of PyTorch's own operations
            return (*_differentiable_gradients(ctx, x, norm_weight, weight, bias, grads), None, None, None)
        parts = torch.split(weight, list(ctx.sizes))
        dtype = product_dtype(grads[0].dtype) if grads[0].device.type == "cpu" else grads[0].dtype
        flat = [grad.flatten(0, -2).to(dtype) for grad in grads]
        g = flat[0] @ parts[0].to(dtype)
        for grad, part in zip(flat[1:], parts[1:], strict=True):
            g = torch.addmm(g, grad, part.to(dtype))
        grad_x, grad_norm_weight, normed = _norm_gradients(g.to(x.dtype), x.flatten(0, -2), norm_weight, scale, dtype)
        of_weight = [grad.t() @ normed for grad in flat]
        grad_weight = (of_weight[0] if len(flat) == 1 else torch.cat(of_weight)).to(weight.dtype)
        grad_bias = None if bias is None else torch.cat([grad.sum(0) for grad in flat]).to(bias.dtype)
        return grad_x.view_as(x), grad_norm_weight, grad_weight, grad_bias, None, None, None


def _norm_gradients(
    g: Tensor, x: Tensor, norm_weight: Tensor, scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of tokens x, (M, D), and of the norm's weight, and the normed tokens in a dtype.

    Args:
        g: Gradient of the normed tokens, (M, D).
        x: Tokens, (M, D).
        norm_weight: (D,).
        scale: 1 / deviation of each token, M of them.
        dtype: Of the normed tokens.
    """
    scale = scale.reshape(-1, 1)
    if _is_native(x, norm_weight, dtype):
        return rms_norm_rows_backward(g, x, norm_weight, scale, dtype)  # type: ignore[no-any-return]
    x_hat = x.mul(scale)
    normed = x_hat.mul(norm_weight).to(dtype)
    along = g * x_hat
    grad_norm_weight = along.sum(0).to(norm_weight.dtype)
    mean = along @ norm_weight.to(x.dtype).unsqueeze(1) / x.shape[-1]
    return g.mul_(norm_weight).sub_(x_hat.mul_(mean)).mul_(scale), grad_norm_weight, normed


def _differentiable_gradients(
    ctx: Any, x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, grads: tuple[Tensor, ...]
) -> list[Tensor | None]:
    normed = (x * inverse_rms(x, ctx.eps) * norm_weight).to(ctx.dtype)
    y = _products(normed, weight.to(ctx.dtype), None if bias is None else bias.to(ctx.dtype), ctx.sizes)
    tensors = (x, norm_weight, weight, bias)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, grads, create_graph=True))
    return [next(found) if t is not None and t.requires_grad else None for t in tensors]
