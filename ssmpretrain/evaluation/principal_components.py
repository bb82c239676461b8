"""Principal components of the patch features of images, as colours that people can compare.

Legend: B images, D features, h x w patches of an image, N = B * h * w, C components
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_SMALLEST = 1e-10  # share of the variance below which a component is rounding error
_LEFT_OUT = 0.93  # grey of patches that are left out


class Components(NamedTuple):
    """Principal components of N vectors.

    Attributes:
        scores: Coordinates along the components, (N, C), float64, with mean 0. A component without variance is 0.
        shares: Share of each component in the variance, (C,), float64, falling.
    """

    scores: Tensor
    shares: Tensor


def principal_components(features: Tensor, count: int) -> Components:
    """Compute the first principal components of vectors, in float64.

    The sign of a component is free. Here the scores of each component have a positive mean cube: few large values are
    on the positive side. So the same features give the same components.

    Args:
        features: Vectors (N, D), finite, of any floating-point type.
        count: C, number of components. Missing ones are 0 if there are fewer dimensions.
    """
    centred = features.double()
    centred = centred - centred.mean(dim=0)
    variances, axes = torch.linalg.eigh(centred.T @ centred)  # (D,), rising; (D, D), a component in each column
    variances, axes = variances.flip(0)[:count].clamp_min(0), axes.flip(1)[:, :count]
    total = centred.square().sum()
    shares = torch.zeros(count, dtype=torch.float64)
    shares[: len(variances)] = variances / total.clamp_min(torch.finfo(torch.float64).tiny)
    scores = torch.zeros(len(features), count, dtype=torch.float64)
    scores[:, : len(variances)] = centred @ axes
    scores[:, shares < _SMALLEST] = 0
    skewed = scores.pow(3).sum(dim=0) < 0
    return Components(torch.where(skewed, -scores, scores), torch.where(shares < _SMALLEST, 0, shares))


def component_colours(maps: Tensor, shown: Tensor | None = None, cut: float = 0.02) -> tuple[Tensor, Tensor]:
    """Return the first three principal components of all patches of all images as red, green and blue.

    Each component is scaled to [0, 1] by itself, from its `cut` quantile to its `1 - cut` quantile over all patches, so
    that a few outliers do not take all the contrast. A component without variance is 0.5.

    Args:
        maps: Features of the patches, (B, D, h, w).
        shown: Patches that the components are made from, (B, h, w), bool, at least one; None for all. Other patches
            are light grey.
        cut: Share of the patches that are cut off at each end, in [0, 0.5).

    Returns:
        Colours (B, 3, h, w) in [0, 1], float32, and the shares of the three components in the variance, (3,).

    Source: Oquab et al., "DINOv2" (arXiv:2304.07193), section 7.6 and fig. 1.
    """
    B, _, h, w = maps.shape
    patches = maps.permute(0, 2, 3, 1).flatten(0, 2)  # (N, D)
    which = torch.ones(B * h * w, dtype=torch.bool) if shown is None else shown.flatten()
    scores, shares = principal_components(patches[which], 3)
    colours = torch.full((B * h * w, 3), _LEFT_OUT)
    colours[which] = _stretched(scores, cut).float()
    return colours.view(B, h, w, 3).permute(0, 3, 1, 2), shares


def foreground(maps: Tensor) -> Tensor:
    """Return the patches on the foreground side of the first principal component, (B, h, w), bool.

    The component splits the patches of all images at its mean. Objects are rarely at the border, so the foreground is
    the side with the smaller share of the patches at the border of the maps. If all patches are equal, it is all.

    Args:
        maps: Features of the patches, (B, D, h, w).

    Source: Oquab et al., "DINOv2" (arXiv:2304.07193), section 7.6, where a person chooses the side.
    """
    B, _, h, w = maps.shape
    found = principal_components(maps.permute(0, 2, 3, 1).flatten(0, 2), 1)
    if not found.shares.any():
        return torch.ones(B, h, w, dtype=torch.bool)
    border = torch.ones(h, w, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    inside = found.scores.view(B, h, w) > 0
    share_at_border = inside[:, border].double().mean()
    return inside if share_at_border <= 0.5 else ~inside


def _stretched(scores: Tensor, cut: float) -> Tensor:
    """Scale each column of scores (N, C) from its lower to its upper quantile to [0, 1]; 0.5 if they are equal."""
    ordered = scores.sort(dim=0).values
    low, high = ordered[round(cut * (len(scores) - 1))], ordered[round((1 - cut) * (len(scores) - 1))]
    scaled = (scores - low) / torch.where(high > low, high - low, 1)
    return torch.where(high > low, scaled, 0.5).clamp(0, 1)
