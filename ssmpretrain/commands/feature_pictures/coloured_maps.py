"""Maps of images as colours: the three principal components of all their patches together."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ssmpretrain.commands.feature_pictures.images import Pictured
from ssmpretrain.evaluation.principal_components import component_colours, foreground


class ColouredMaps(NamedTuple):
    """The coloured maps of all images by one encoder.

    Attributes:
        word: Word for the encoder beside its rows; empty if it is the only one.
        heading: Line that says which encoder and weights these are.
        colours: Colours (B, 3, h, w) in [0, 1].
        shares: Shares of the three components in the variance of the patches, (3,).
    """

    word: str
    heading: str
    colours: Tensor
    shares: Tensor

    def describe(self) -> str:
        """Say the size of the maps, and the shares of the variance that red, green and blue show."""
        h, w = self.colours.shape[2:]
        each = " + ".join(f"{100 * share:.0f}" for share in self.shares.tolist())
        return f"{h} x {w} patches, {each} % of the variance"


def colour_maps(
    word: str, heading: str, encode: Callable[[Tensor], Tensor], images: Pictured, *, foreground_alone: bool = False
) -> ColouredMaps:
    """Encode images and colour their maps.

    Args:
        word, heading: As in `ColouredMaps`.
        encode: Maps images (B, 3, H, W) to maps (B, D, h, w).
        images: Batches of the images; their maps are held in memory.
        foreground_alone: Whether to leave out the background, see `foreground`.
    """
    maps = torch.cat([encode(batch).float().cpu() for batch, _ in images])
    colours, shares = component_colours(maps, foreground(maps) if foreground_alone else None)
    return ColouredMaps(word, heading, colours, shares)
