"""Layers of encoders in stages for masked images: they compute only the visible positions of maps.

B images, K visible patches, L visible positions of a map, C channels
"""

import torch
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.layers.state_space import stream
from ssmpretrain.encoders.masking.visible_map import VisibleMap, blank_hidden
from ssmpretrain.encoders.vmamba.blocks import PatchMerging, channels_last


def visible_maps(where: str, images: Tensor, keep: Tensor, side: int, num_stages: int) -> list[VisibleMap]:
    """Return the visible positions of each stage's map, one `VisibleMap` per stage.

    Args:
        where: Name of the encoder, used in error messages.
        images: Images, (B, C, height, width).
        keep: Raster indices of the visible patches, ascending, (B, K), int64.
        side: Side of a patch in pixels; a patch is one position of the last stage's map.
        num_stages: Number of stages.

    Raises:
        ValueError: If the patches do not fill the images exactly, or the indices are not ascending or out of range.
    """
    grid = _patch_grid(where, images, side)
    _check_keep(where, keep, images, grid)
    return [VisibleMap(keep, grid, 2**stage) for stage in reversed(range(num_stages))]


def embed_visible(stem: nn.Sequential, images: Tensor, keep: Tensor, target: VisibleMap, side: int) -> Tensor:
    """Run a stem with all hidden pixels set to zero.

    Its first convolution reads whole images. The later layers compute only visible positions.

    Args:
        stem: The encoder's `patch_embed`.
        images: Images, (B, C, height, width).
        keep, side: As in `visible_maps`.
        target: Visible positions of the first stage's map.

    Returns:
        Features at the visible positions, (B, 1, L, C), float32 or float64.
    """
    grid = images.shape[2] // side, images.shape[3] // side
    x = stem[:2](channels_last(blank_hidden(images, keep, grid)))
    source = VisibleMap(keep, grid, x.shape[1] // grid[0])
    return stream(run_visible(stem[2:], source.pack(x), source, target))


def run_visible(layers: nn.Module, x: Tensor, source: VisibleMap, target: VisibleMap) -> Tensor:
    """Run layers of a stem, or the layers between two stages, on the visible positions of a map.

    Args:
        layers: The layers.
        x: Features at the visible positions of the input map, (B, 1, L, C).
        source, target: Visible positions of the input map and of the output map.

    Returns:
        Features at the visible positions of the output map, (B, 1, L', C').
    """
    if isinstance(layers, PatchMerging):
        return layers.forward_visible(x, source, target)
    for layer in layers.children():
        x = source.convolve(layer, x, target) if isinstance(layer, nn.Conv2d) else layer(x)
    return x


def _patch_grid(where: str, images: Tensor, side: int) -> tuple[int, int]:
    """Return the numbers of rows and columns of patches in images (B, C, height, width)."""
    height, width = images.shape[2:]
    if height % side or width % side:
        nearest = " x ".join(str(max(round(pixels / side), 1) * side) for pixels in (height, width))
        raise UserError(
            f"{where}: patches of {side} x {side} pixels must fill an image to hide some of them; "
            f"got {height} x {width} (height x width). Resize or crop it, e.g. to {nearest}."
        )
    return height // side, width // side


def _check_keep(where: str, keep: Tensor, images: Tensor, grid: tuple[int, int]) -> None:
    patches = grid[0] * grid[1]
    shaped = keep.ndim == 2 and len(keep) == len(images) and 0 < keep.shape[1] <= patches
    if not shaped or keep.dtype != torch.int64 or keep.device != images.device:
        raise UserError(
            f"{where}: keep is int64 (batch, visible patches) = ({len(images)}, 1 to {patches}) on {images.device}; "
            f"got {keep.dtype} {tuple(keep.shape)} on {keep.device}."
        )
    if keep.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = ((keep < 0) | (keep >= patches)).any(dim=1) | (keep.diff(dim=1) <= 0).any(dim=1)
    if wrong.any():
        raise UserError(
            f"{where}: keep names patches 0 to {patches - 1} of an image in ascending order, each once; "
            f"got {keep[wrong][0].tolist()}. Sort it."
        )
