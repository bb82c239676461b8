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
    before, after = (0, weight.shape[1] - 1) if reverse else (weight.shape[1] - 1, 0)
    return _like(x, _convolve(x, weight.flip(-1) if reverse else weight, bias, activation, before, after))


def centred_conv1d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: Activation = None
) -> Tensor:
    """Compute `centred_conv1d`; arguments and result are the same."""
    before = weight.shape[1] // 2
    return _like(x, _convolve(x, weight, bias, activation, before, weight.shape[1] - 1 - before))


def bidirectional_causal_conv1d_reference(
    x: Tensor, weights: Tensor, biases: Tensor | None = None, *, activation: Activation = None
) -> Tensor:
    """Compute `bidirectional_causal_conv1d`; arguments and result are the same."""
    causal, anticausal = (None, None) if biases is None else biases.unbind()
    halo = weights.shape[2] - 1
    forwards = _convolve(x, weights[0], causal, activation, halo, 0)
    backwards = _convolve(x, weights[1].flip(-1), anticausal, activation, 0, halo)
    if is_transformed((x, forwards, backwards)):
        return torch.stack([forwards, backwards]).to(x.dtype)
    out = x.new_empty_strided((2, *x.shape), (x.numel(), *torch.empty_like(x).stride()))
    out[0], out[1] = forwards, backwards
    return out


def _convolve(x: Tensor, taps: Tensor, bias: Tensor | None, activation: Activation, before: int, after: int) -> Tensor:
    """Return sums over the tokens from `before` back to `after` ahead, in float32 or float64, contiguous."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    padded = F.pad(x.to(dtype), (before, after))
    with without_autocast(x.device.type):
        out = F.conv1d(padded, taps.to(dtype).unsqueeze(1), None if bias is None else bias.to(dtype), groups=x.shape[1])
    return F.silu(out) if activation == "silu" else out


def _like(x: Tensor, out: Tensor) -> Tensor:
    """Return an output in x's dtype and strides."""
    if is_transformed((x, out)):  # a transform does not know memory made by empty_like
        return out.to(x.dtype)
    return torch.empty_like(x).copy_(out)  # in one pass
