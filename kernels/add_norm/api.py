"""The contract of `add_norm` and the choice of implementation."""

# B batch, L tokens, D channels

from typing import get_args

import torch
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.kernels.add_norm.inputs import AddNormInputs
from ssmpretrain.kernels.add_norm.op import add_norm_op
from ssmpretrain.kernels.add_norm.reference import Norm, add_norm_reference
from ssmpretrain.kernels.dispatch import Impl, check_dtypes_and_devices, check_tensors, choose_implementation


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm = "rms",
    eps: float = 1e-5,
    drop_path_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute `h = residual + scale_b x` and `norm(h) weight + bias`, where `norm(h) = h / sqrt(mean(h^2) + eps)`.

    Arithmetic and residual stream are float32 for all dtypes of x, and autocast changes nothing: x may be bfloat16
    while residual, weight and bias stay float32. Every input but drop_path_scale is differentiable, and its gradient
    has its dtype. Outputs and gradients are the same bits on every run. For the backward pass the residual sum is kept,
    which the caller holds anyway, and one or two numbers per token. If x is float64, all inputs must be; the reference
    then computes in float64, for checks.

    Args:
        x: Output of a branch, (B, L, D); the kernel reads any strides whose last is 1 and copies others.
        residual: Residual stream, (B, L, D), or None for zeros, before the first block.
        weight: Scale of the norm, (D,).
        bias: Shift of the norm, (D,), or None.
        norm: "rms", or "layer", which takes the mean off h first.
        eps: Added to the mean square, above 0.
        drop_path_scale: Factor of each sequence of x, (B,), float32: 0 where stochastic depth drops the branch,
            1 / (1 - rate) where it keeps it. None for 1; gets no gradient.
        out_dtype: Dtype of the normed tokens; None for the dtype of x. Useful in a first block, whose float32 tokens go
            to a linear layer under autocast.
        impl: "auto" takes the Triton kernel on CUDA and PyTorch's own norms elsewhere; "triton", "cpu" and "reference"
            name one ("cpu" and "reference" are the same here).

    Returns:
        The normed tokens, (B, L, D), in out_dtype, contiguous, and h, (B, L, D), float32. If h equals x, x is returned
        in its place.

    Raises:
        ValueError: If a shape, dtype or device does not fit, L is 0, or norm, eps or impl is unknown or cannot be used.

    Source: Zhang & Sennrich, "Root Mean Square Layer Normalization" (arXiv:1910.07467), eq. 4; Ba et al., "Layer
    Normalization" (arXiv:1607.06450), eq. 4; Huang et al., "Deep Networks with Stochastic Depth" (arXiv:1603.09382).
    """
    check_tensors(
        "add_norm",
        {"x": x, "weight": weight},
        {"residual": residual, "bias": bias, "drop_path_scale": drop_path_scale},
    )
    scale = None if drop_path_scale is None else drop_path_scale.detach()
    inputs = AddNormInputs(x, residual, weight, bias, scale, norm == "layer", eps, out_dtype or x.dtype)
    _check(inputs, norm)
    if choose_implementation("add_norm", x, impl, inputs) == "triton":
        scale = None if scale is None else scale.contiguous()
        normed, total, *_ = add_norm_op(*inputs._replace(drop_path_scale=scale))
        return normed, x if inputs.is_sum_itself else total
    return add_norm_reference(
        *(x, residual, weight, bias), norm=norm, eps=eps, drop_path_scale=scale, out_dtype=inputs.out_dtype
    )


def _check(inputs: AddNormInputs, norm: str) -> None:
    x, residual, weight, bias, scale, _, eps, out_dtype = inputs
    if x.ndim != 3 or 0 in x.shape[1:]:
        raise UserError(f"add_norm: x is (B, L, D), none but B 0; got {tuple(x.shape)}. Change the shape.")
    if residual is not None and residual.shape != x.shape:
        raise UserError(
            f"add_norm: residual is (B, L, D) like x, {tuple(x.shape)}; got {tuple(residual.shape)}. Change the shape."
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.shape != x.shape[2:]:
            raise UserError(
                f"add_norm: {name} is (D,) with x's D = {x.shape[2]}; got {tuple(tensor.shape)}. Change the shape."
            )
    if scale is not None and scale.shape != x.shape[:1]:
        raise UserError(
            f"add_norm: drop_path_scale is (B,) with x's B = {x.shape[0]}; got {tuple(scale.shape)}. Change the shape."
        )
    if norm not in get_args(Norm):
        raise UserError(f"add_norm: norm is one of {', '.join(get_args(Norm))}; got {norm!r}. Give one of them.")
    if not isinstance(eps, float | int) or not 0 < eps < float("inf"):
        raise UserError(
            f"add_norm: eps is above 0 and finite, so that a token of zeros has a norm; got {eps}. Choose another."
        )
    check_dtypes_and_devices("add_norm", zip(inputs._fields, inputs, strict=True))
    if scale is not None and scale.dtype not in (torch.float32, torch.float64):
        raise UserError(f"add_norm: drop_path_scale is float32; got {scale.dtype}. Convert it.")
    if out_dtype not in (torch.float32, torch.bfloat16, torch.float16) and out_dtype != x.dtype:
        raise UserError(f"add_norm: out_dtype is float32, bfloat16 or float16; got {out_dtype}. Choose one of them.")
