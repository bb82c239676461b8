"""Mask tokens in the place of what an encoder's stem, its patch embedding, makes of hidden patches.

B images, h x w positions of the last map, C channels of the stem
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from timm.layers.format import Format
from torch import Tensor, nn

from ssmpretrain.encoders.families import family_of


class Stem(NamedTuple):
    """The part of an encoder that turns pixels into the map that its first block reads.

    Attributes:
        module: Called once an image, on all of it.
        layout: Axes of its output, NLC (one token per position of the last map), NHWC or NCHW.
        width: C.
        map_stride: Pixels along one position of the encoder's last map.
    """

    module: nn.Module
    layout: Format
    width: int
    map_stride: int


def stem_of(encoder: nn.Module) -> Stem | None:
    """Return the stem of an encoder; None if its family knows none.

    Raises:
        ValueError: If the encoder's patches overlap, so that they do not divide the image among them.
    """
    known = family_of(encoder).stem(encoder)
    if known is None:
        return None
    stages = cast(Any, encoder).feature_info
    return Stem(*known, width=stages[0]["num_chs"], map_stride=stages[-1]["reduction"])


@contextmanager
def masked_stem(encoder: nn.Module, hidden: Tensor, mask_token: Tensor) -> Iterator[None]:
    """Let the stem give the mask token at hidden positions and its own output elsewhere, while the context lasts.

    Args:
        encoder: One that `stem_of` knows.
        hidden: True where a position of the last map is hidden, (B, h, w), bool. All positions of the stem's map that
            become one of the last map share its fate.
        mask_token: (1, 1, 1, C); cast to the dtype of the stem's output.
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
    """Shape the mask and the token to broadcast against an output of the stem."""
    if layout is Format.NLC:
        return hidden.flatten(1).unsqueeze(-1), token[0]
    channels_last = layout is Format.NHWC
    side = (shape[1] if channels_last else shape[2]) // hidden.shape[1]
    where = hidden.repeat_interleave(side, 1).repeat_interleave(side, 2).unsqueeze(-1)
    return (where, token) if channels_last else (where.permute(0, 3, 1, 2), token.permute(0, 3, 1, 2))
