"""Effective receptive field: the effect of each pixel on the centre of an encoder's last map."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.features.maps import last_map


class ReceptiveField(NamedTuple):
    """Contributions of all pixels to the central position of a map.

    Attributes:
        contributions: Contribution of each pixel, (H, W), float64, at least 0, on the CPU.
        centre: Centre (y, x) of the position, in pixels from the upper left corner, rounded to half pixels.
    """

    contributions: Tensor
    centre: tuple[float, float]


class Square(NamedTuple):
    """Square of pixels around the centre of a receptive field, cut off at the border of the image.

    Attributes:
        top, left: First row and first column, in pixels from 0.
        height, width: Numbers of rows and columns.
    """

    top: int
    left: int
    height: int
    width: int

    @property
    def side(self) -> int:
        """Return the longer side in pixels."""
        return max(self.height, self.width)


def receptive_field(encoder: nn.Module, images: Tensor, batch_size: int = 8) -> ReceptiveField:
    """Measure the effective receptive field of the central position of an encoder's last map.

    A pixel contributes `sum_channels max(0, d s / d x)`, averaged over the images, where `s = sum_d max(0, f_d)` sums
    the features `f` of position (h // 2, w // 2). Without the maximum, `s` would be constant after a LayerNorm, whose
    output sums to zero.

    Args:
        encoder: An encoder with timm's method `forward_intermediates`, in evaluation mode.
        images: Normalised images, (B, 3, H, W), floating-point, on the device of the encoder; B is at least 1.
        batch_size: Images per backward pass, at least 1. It changes the memory, not the result.

    Raises:
        ValueError: If the encoder is in training mode or has no `forward_intermediates`, or if the contributions are
            all zero or not finite.

    Source: Luo et al., "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks"
        (arXiv:1701.04128); maximum, sum and mean as in Ding et al., "Scaling Up Your Kernels to 31x31"
        (arXiv:2203.06717), and its code.
    """
    if encoder.training:
        raise UserError("receptive_field: encoder is in evaluation mode; got one in training. Call encoder.eval().")
    if not hasattr(encoder, "forward_intermediates"):
        raise UserError(
            f"receptive_field: encoder has timm's forward_intermediates; {type(encoder).__name__} lacks it."
        )
    total, grid = torch.zeros(images.shape[-2:], dtype=torch.float64), (1, 1)
    for start in range(0, len(images), batch_size):
        contributions, grid = _contributions(encoder, images[start : start + batch_size])
        total += contributions
    if not total.isfinite().all() or not total.any():
        raise UserError(
            "receptive_field: some pixels contribute, finitely; got contributions that are "
            f"{'not finite' if total.any() else 'all zero'}. Check the encoder's weights."
        )
    y, x = (
        round((count // 2 + 0.5) * side / count * 2) / 2 for count, side in zip(grid, images.shape[-2:], strict=True)
    )
    return ReceptiveField(total / len(images), (y, x))


def _contributions(encoder: nn.Module, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Return the contributions (H, W) of pixels, summed over images (B, 3, H, W), and the size (h, w) of the map."""
    images = images.detach().requires_grad_()
    with torch.enable_grad():
        features = last_map(encoder, images)
        h, w = features.shape[2:]
        score = features[:, :, h // 2, w // 2].relu().sum()
    (gradient,) = torch.autograd.grad(score, images)
    if not score.isfinite():
        gradient = gradient.fill_(torch.nan)  # the gradient of max(0, NaN) is 0
    return gradient.relu().sum(dim=(0, 1)).cpu(), (h, w)


def smallest_square(field: ReceptiveField, share: float) -> Square:
    """Return the smallest square around the centre whose contributions are a given share of all contributions.

    Args:
        field: The receptive field.
        share: The share, in (0, 1].
    """
    H, W = field.contributions.shape
    y, x = field.centre
    rows = (torch.arange(H, dtype=torch.float64) + 0.5 - y).abs()
    columns = (torch.arange(W, dtype=torch.float64) + 0.5 - x).abs()
    half = (
        torch.maximum(rows.unsqueeze(1), columns.unsqueeze(0)).flatten() + 0.5
    )  # half the side of the square that includes the pixel
    half, outwards = half.sort()
    held = field.contributions.flatten()[outwards].cumsum(0)
    reach = float(half[int(torch.searchsorted(held, share * held[-1]))])
    top, left = max(0, math.ceil(y - reach)), max(0, math.ceil(x - reach))
    return Square(top, left, min(H, math.floor(y + reach)) - top, min(W, math.floor(x + reach)) - left)
