"""Root-mean-square norm, alone or fused with the projection that follows it.

    x_hat = x / sqrt(mean(x^2) + eps),   y = x_hat * weight

Source: Zhang & Sennrich, "Root Mean Square Layer Normalization" (arXiv:1910.07467), equation 4.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from ssmpretrain.encoders.layers.fx_tracing import one_node
from ssmpretrain.encoders.layers.state_space import compute_dtype
from ssmpretrain.kernels.add_norm import add_norm
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
        linear: A projection without bias.


    Returns:
        (B, L, outputs), in the dtype of autocast if autocast is on, else in the dtype of the projection's weight.
    """
    if is_jit_tracing() or inside_transform():
        return linear(norm(x))  # type: ignore[no-any-return]
    dtype = compute_dtype(x, linear.weight)
    if x.is_cuda and x.dtype == torch.float32:
        normed, _ = add_norm(x, None, norm.weight, eps=norm.eps, out_dtype=dtype)
        return F.linear(normed, linear.weight.to(dtype))
    if torch.is_grad_enabled():
        return _RMSNormLinear.apply(x, norm.weight, linear.weight, norm.eps, dtype)  # type: ignore[no-any-return, no-untyped-call]
    normed = x.mul(inverse_rms(x, norm.eps)).mul_(norm.weight)
    return F.linear(normed.to(dtype), linear.weight.to(dtype))


class _RMSNormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        scale = inverse_rms(x, eps)
        ctx.save_for_backward(x, scale, norm_weight, weight)
        ctx.eps, ctx.dtype = eps, dtype
        return F.linear(x.mul(scale).mul_(norm_weight).to(dtype), weight.to(dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        # With g = d loss / d (x_hat * w):  d w = sum g x_hat,  d x = scale * (g w - x_hat * mean(g w x_hat)).
        x, scale, norm_weight, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative the gradient is a graph of PyTorch's own operations
            normed = (x * inverse_rms(x, ctx.eps) * norm_weight).to(ctx.dtype)
            y = F.linear(normed, weight.to(ctx.dtype))
            wanted = [t for t in (x, norm_weight, weight) if t.requires_grad]
            found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
            one, two, three = (next(found) if t.requires_grad else None for t in (x, norm_weight, weight))
            return one, two, three, None, None
        grad = grad.flatten(0, -2)
        x_hat = x.mul(scale).flatten(0, -2)
        g = (grad @ weight.to(grad.dtype)).to(x.dtype)
        grad_weight = (grad.t() @ x_hat.mul(norm_weight).to(grad.dtype)).to(weight.dtype)
        along = g * x_hat
        grad_norm_weight = along.sum(0).to(norm_weight.dtype)
        mean = along @ norm_weight.to(x.dtype).unsqueeze(1) / x.shape[-1]
        grad_x = g.mul_(norm_weight).sub_(x_hat.mul_(mean)).view_as(x).mul_(scale)
        return grad_x, grad_norm_weight, grad_weight, None, None
