"""Launch the causal convolution on the GPU: allocate outputs, divide the work, start the kernels.

All strides are read and written. The kernels are fast if channels lie next to each other, as in (B, L, E) memory.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from ssmpretrain.kernels.causal_conv1d import triton_kernels
from ssmpretrain.kernels.gpu.launch import launch

CHANNELS = 64  # of a program of one warp: two per thread, which reads 128 bytes at a time in bfloat16
SPANS = (256, 128, 64, 32)  # tokens of a program: the most that still give ENOUGH_PROGRAMS, else half the least
ENOUGH_PROGRAMS = 2048  # about 16 warps on each multiprocessor of an H100


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, reverse: bool, silu: bool, centred: bool = False
) -> Tensor:
    """Return the outputs of one direction or of both, (K, B, E, L), in x's dtype; each has x's strides where dense.

    Args:
        x: (B, E, L), any strides.
        weight: (K, E, W), any strides. With K = 2, direction 0 is causal and direction 1 anti-causal.
        bias: (K, E) or None.
        reverse: With K = 1, compute the anti-causal direction.
        silu: Apply SiLU.
        centred: With K = 1, tap W // 2 meets the current token.
    """
    dense = torch.empty_like(x, device="meta").stride()
    out = x.new_empty_strided((weight.shape[0], *x.shape), (x.numel(), *dense))
    programs, arguments = _arguments(x, weight, bias, reverse, silu, centred)
    launch(triton_kernels.convolve, (programs,), 1, out=out, **_strides("out", out, "kbel"), **arguments, UNROLL=8)
    return out


def backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    reverse: bool,
    silu: bool,
    centred: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of x (summed over directions), weight and bias, in their dtypes.

    Args:
        dout: Gradient of the outputs, (K, B, E, L), any strides.
        x, weight, bias, reverse, silu, centred: As for `forward`.
        out: Memory for the gradient of x, (B, E, L), any strides and dtype; None allocates it with those of x.
    """
    directions, channels, taps = weight.shape
    dx = torch.empty_like(x) if out is None else out
    programs, arguments = _arguments(x, weight, bias, reverse, silu, centred)
    rows = programs // arguments["blocks"]
    partial = x.new_empty((rows, directions, taps + 1, channels), dtype=torch.float32)
    launch(
        triton_kernels.convolve_backward,
        (programs,),
        1,
        dout=dout,
        dx=dx,
        partial=partial,
        **_strides("dout", dout, "kbel"),
        **_strides("dx", dx, "bel"),
        **arguments,
        UNROLL=4,
    )
    dweight = partial[:, :, :taps].sum(0).mT.to(weight.dtype).contiguous()
    return dx, dweight, None if bias is None else partial[:, :, taps].sum(0).to(bias.dtype)


def _arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, silu: bool, centred: bool
) -> tuple[int, dict[str, Any]]:
    """Return the number of programs, a function of the shapes alone, and the arguments of both kernels."""
    batch, channels, tokens = x.shape
    directions, _, taps = weight.shape
    blocks = triton.cdiv(channels, CHANNELS)
    span = next((s for s in SPANS if batch * blocks * triton.cdiv(tokens, s) >= ENOUGH_PROGRAMS), SPANS[-1] // 2)
    spans = triton.cdiv(tokens, span)
    arguments = {
        "x": x,
        "weight": weight,
        "bias": bias,
        "channels": channels,
        "tokens": tokens,
        **_strides("x", x, "bel"),
        **_strides("weight", weight, "kew"),
        **({"bias_k": 0, "bias_e": 0} if bias is None else _strides("bias", bias, "ke")),
        "blocks": blocks,
        "spans": spans,
        "span": triton.cdiv(tokens, spans),
        "CAUSAL": directions == 2 or not reverse,
        "ANTICAUSAL": directions == 2 or reverse,
        "AHEAD": taps - 1 - taps // 2 if centred else 0,
        "TAPS": taps,
        "SILU": silu,
        "BE": CHANNELS,
    }
    return blocks * spans * batch, arguments


def _strides(name: str, tensor: Tensor, letters: str) -> dict[str, int]:
    return {f"{name}_{letter}": stride for letter, stride in zip(letters, tensor.stride(), strict=True)}
