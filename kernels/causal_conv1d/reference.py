"""The causal convolution in PyTorch's own operations, one line per line of mathematics."""

# B batch, E channels, L tokens, W taps

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmpretrain.kernels.dispatch import is_transformed, without_autocast

Activation = Literal["silu"] | None


def causal_conv1d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: Activation = None, reverse: bool = False
) -> Tensor:
    """Compute `causal_conv1d`. All other implementations are tested against this one.

    Arguments and result are those of `causal_conv1d`. Computes in float64 when x is float64, in float32 otherwise.
    """
    out = _convolve(x, weight, bias, activation, reverse)
    if is_transformed((x, out)):  # a transform does not know memory made by empty_like
        return out.to(x.dtype)
    return torch.empty_like(x).copy_(out)  # in x's dtype and strides, in one pass


def bidirectional_causal_conv1d_reference(
    x: Tensor, weights: Tensor, biases: Tensor | None = None, *, activation: Activation = None
) -> Tensor:
    """Compute `bidirectional_causal_conv1d`; arguments and result are the same."""
    causal, anticausal = (None, None) if biases is None else biases.unbind()
    forwards = _convolve(x, weights[0], causal, activation, reverse=False)
    backwards = _convolve(x, weights[1], anticausal, activation, reverse=True)
    if is_transformed((x, forwards, backwards)):
        return torch.stack([forwards, backwards]).to(x.dtype)
    out = x.new_empty_strided((2, *x.shape), (x.numel(), *torch.empty_like(x).stride()))
    out[0], out[1] = forwards, backwards
    return out


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation, reverse: bool) -> Tensor:
    """Return the convolution in float32 or float64, contiguous."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    halo = weight.shape[1] - 1
    taps = weight.flip(-1) if reverse else weight
    padded = F.pad(x.to(dtype), (0, halo) if reverse else (halo, 0))
    with without_autocast(x.device.type):
        out = F.conv1d(padded, taps.to(dtype).unsqueeze(1), None if bias is None else bias.to(dtype), groups=x.shape[1])
    return F.silu(out) if activation == "silu" else out
