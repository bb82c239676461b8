"""Launch the native convolution: allocate outputs and pass sizes, strides and addresses. All strides are read."""

import torch
from torch import Tensor

from ssmpretrain.kernels.native import library

_ABSENT_TENSOR = (0, 0, 0, 0, 0)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *, reverse: bool, centred: bool, silu: bool) -> Tensor:
    """Return the outputs of one direction or of both, (K, B, E, L), in x's dtype; each has x's strides where dense.

    Args:
        x: (B, E, L), float32 or bfloat16.
        weight: (K, E, W). With K = 2, direction 0 is causal and direction 1 anti-causal.
        bias: (K, E) or None.
        reverse: With K = 1, compute the anti-causal direction.
        centred: With K = 1, tap W // 2 meets the current token.
        silu: Apply SiLU.
    """
    out = x.new_empty_strided((weight.shape[0], *x.shape), (x.numel(), *torch.empty_like(x).stride()))
    weight, bias = _float32(weight), None if bias is None else _float32(bias)
    options = (reverse, centred, silu)
    arguments = (*_sizes(x, weight), *options, *_fields(x), *_parameters(weight, bias), *_directions(out))
    library.call("causal_conv1d", (*arguments, *_ABSENT_TENSOR, 0, 0))
    return out


def backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *, reverse: bool, centred: bool, silu: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of x (summed over directions), weight and bias, in their dtypes.

    Args:
        dout: Gradient of the outputs, (K, B, E, L), float32 or bfloat16.
        x, weight, bias, reverse, centred, silu: As for `forward`.
    """
    dx = torch.empty_like(x)
    weight_32, bias_32 = _float32(weight), None if bias is None else _float32(bias)
    dweight, dbias = torch.empty_like(weight_32), None if bias_32 is None else torch.empty_like(bias_32)
    options = (reverse, centred, silu)
    arguments = (*_sizes(x, weight), *options, *_fields(x), *_parameters(weight_32, bias_32), *_directions(dout))
    library.call("causal_conv1d_backward", (*arguments, *_fields(dx), *_parameters(dweight, dbias)))
    return dx, dweight.to(weight.dtype), None if bias is None or dbias is None else dbias.to(bias.dtype)


def _float32(parameters: Tensor) -> Tensor:
    return parameters.float().contiguous()


def _sizes(x: Tensor, weight: Tensor) -> tuple[int, ...]:
    directions, _, taps = weight.shape
    return (*x.shape, taps, directions)


def _fields(tensor: Tensor) -> tuple[int, ...]:
    return (tensor.data_ptr(), tensor.dtype == torch.bfloat16, *tensor.stride())


def _directions(tensor: Tensor) -> tuple[int, ...]:
    """Describe direction 0 of a (K, B, E, L) tensor, and the bytes from it to the other direction."""
    return (*_fields(tensor[0]), tensor.stride(0) * tensor.element_size())


def _parameters(weight: Tensor, bias: Tensor | None) -> tuple[int, int]:
    return weight.data_ptr(), 0 if bias is None else bias.data_ptr()
