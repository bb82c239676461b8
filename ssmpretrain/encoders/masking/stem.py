"""Mask tokens: replace the output of an encoder's stem, its patch embedding, at hidden patches.

B images, h x w positions of the last map, C channels of the stem
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from timm.layers.format import Format
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.family_registry import choices, family_of


class Stem(NamedTuple):
    """Stem of an encoder: the part that turns pixels into the map that the first block reads.

    Attributes:
        module: The module, which the encoder calls once per forward pass on whole images.
        layout: Axes of the module's output: NLC (one token per position of the last map), NHWC or NCHW.
        width: C, channels of the module's output.
        map_stride: Stride of the encoder's last map in pixels.
    """

    module: nn.Module
    layout: Format
    width: int
    map_stride: int


def stem_of(encoder: nn.Module) -> Stem | None:
    """Return the stem of an encoder; None if its family has no stem.

    Raises:
        ValueError: If the patches of the encoder overlap.
    """
    known = family_of(encoder).stem(encoder)
    if known is None:
        return None
    stages = cast(Any, encoder).feature_info
    return Stem(*known, width=stages[0]["num_chs"], map_stride=stages[-1]["reduction"])


def require_stem(where: str, encoder: nn.Module, name: str) -> Stem:
    """Return the stem of an encoder, or raise an error that names the encoders that have one.

    Args:
        where: Name of the objective, used in error messages.
        encoder: The encoder.
        name: Its registered name, used in error messages.

    Raises:
        UserError: If the family has no stem, or if the patches of the encoder overlap.
    """
    try:
        stem = stem_of(encoder)
    except ValueError as error:
        raise UserError(f"{where}: {name}: {error}") from error
    if stem is None:
        able = choices(lambda family: family.has_stem)
        raise UserError(
            f"{where}: the mask token replaces the output of the encoder's patch embedding at hidden patches; "
            f"{name!r} ({type(encoder).__name__}) has none that is known. Choose {able}."
        )
    return stem


def blank(images: Tensor, hidden: Tensor) -> Tensor:
    """Return images with the pixels of hidden positions set to 0, the mean colour, even if they are NaN.

    The convolutions of an overlapping stem would carry hidden pixels to visible positions beside them.

    Args:
        images: Normalised images, (B, C, H, W). H and W are multiples of h and w.
        hidden: True at hidden positions of the last map, (B, h, w), bool.
    """
    height, width = images.shape[2] // hidden.shape[1], images.shape[3] // hidden.shape[2]
    pixels = hidden.unsqueeze(1).repeat_interleave(height, dim=2).repeat_interleave(width, dim=3)
    return torch.where(pixels, images.new_zeros(()), images)


@contextmanager
def masked_stem(encoder: nn.Module, hidden: Tensor, mask_token: Tensor) -> Iterator[None]:
    """Replace the output of an encoder's stem by a mask token at hidden positions, inside this context.

    Args:
        encoder: An encoder for which `stem_of` returns a stem.
        hidden: True at hidden positions of the last map, (B, h, w), bool. A hidden position of the last map hides all
            positions of the stem's map that it covers.
        mask_token: The mask token, (1, 1, 1, C). It is cast to the dtype of the stem's output.
    """
    stem = stem_of(encoder)
    assert stem is not None, type(encoder)

    def swap(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        where, token = _in_layout(stem.layout, hidden, mask_token, output.shape)
        return torch.where(where, token.to(output.dtype), output)

    handle = stem.module.register_forward_hook(swap)
    try:
        yield
    finally:
        handle.remove()


def _in_layout(layout: Format, hidden: Tensor, token: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Return the mask and the token in shapes that broadcast with the output of the stem."""
    if layout is Format.NLC:
        return hidden.flatten(1).unsqueeze(-1), token[0]
    channels_last = layout is Format.NHWC
    side = (shape[1] if channels_last else shape[2]) // hidden.shape[1]
    where = hidden.repeat_interleave(side, 1).repeat_interleave(side, 2).unsqueeze(-1)
    return (where, token) if channels_last else (where.permute(0, 3, 1, 2), token.permute(0, 3, 1, 2))
