"""Base class of the families whose encoders keep an image as one sequence of patches and class tokens."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ssmpretrain.encoders.family import Adapted, Family
from ssmpretrain.encoders.sequence.class_token import class_positions, remove_class_tokens, token_in_table
from ssmpretrain.encoders.sequence.encoder import SequenceEncoder
from ssmpretrain.encoders.sequence.patch_embed import to_height_width
from ssmpretrain.encoders.sequence.pos_embed import resize_pos_embed, square_side


class SequenceFamily(Family):
    """Base of the families whose encoders are subclasses of `SequenceEncoder`.

    It resizes position embeddings and reads class tokens at any place of the sequence.
    """

    implied: ClassVar[Mapping[str, Any]] = {"patch_size": 16}
    resizes_positions: ClassVar[bool] = True
    gives_pyramid: ClassVar[bool] = True

    def adapt(
        self, state: Mapping[str, Tensor], encoder: SequenceEncoder, built_with: Mapping[str, Any] | None
    ) -> Adapted:
        wanted = encoder.patch_embed.grid_size
        grid = None if "pos_embed" not in state else _grid_in(state["pos_embed"], encoder, built_with)
        if grid in (None, wanted):
            return Adapted(dict(state))
        assert grid is not None
        resized = resize_pos_embed(state["pos_embed"], grid, wanted, encoder.class_token)
        note = f"positions resized from {grid[0]} x {grid[1]} to {wanted[0]} x {wanted[1]} patches"
        return Adapted({**state, "pos_embed": resized}, ("pos_embed",), notes=(note,))

    def compilable_blocks(self, encoder: SequenceEncoder) -> list[nn.Module]:
        return [] if encoder.blocks_per_stage > 1 else [*encoder.layers]  # pairs of blocks call a method of theirs

    # Maps for dense tasks

    def view_sides(self, encoder: SequenceEncoder) -> tuple[int, int]:
        return encoder.patch_embed.patch_size, encoder.patch_embed.stride

    def tap_size(self, encoder: SequenceEncoder, size: tuple[int, int]) -> tuple[int, int]:
        stride = encoder.patch_embed.stride
        beyond = encoder.patch_embed.patch_size - stride  # overlapping patches reach beyond their stride
        return -(-size[0] // stride) * stride + beyond, -(-size[1] // stride) * stride + beyond

    def tap(
        self,
        encoder: SequenceEncoder,
        images: Tensor,
        indices: Sequence[int],
        *,
        read: str,
        norm: bool,
        class_token: bool,
    ) -> list[Tensor]:
        tokens, grid_size = encoder.embed_all(images, class_token)
        kept = encoder.class_token if class_token else "none"
        maps = []
        for one in encoder.run(tokens, indices, max(indices), grid_size, read)[1]:
            patches, _ = remove_class_tokens(encoder.norm_f(one) if norm else one, kept, encoder.num_registers)
            maps.append(patches.transpose(1, 2).reshape(patches.shape[0], -1, *grid_size))
        return maps

    def has_class_token(self, encoder: SequenceEncoder) -> bool:
        return bool(encoder.num_class_tokens)

    def class_vector(self, tokens: Tensor) -> Tensor:
        return tokens.mean(dim=1)


def _grid_in(table: Tensor, encoder: SequenceEncoder, built_with: Mapping[str, Any] | None) -> tuple[int, int] | None:
    """Return (rows, columns) of the patches that a position embedding belongs to; None if they are unknown."""
    wanted, patch_size = encoder.patch_embed.grid_size, encoder.patch_embed.patch_size
    if table.ndim != 3:
        return None  # `fill` will report the wrong shape
    if built_with is not None:
        stride = built_with.get("stride") or patch_size
        height, width = to_height_width(built_with.get("img_size", 224))
        grid = ((height - patch_size) // stride + 1, (width - patch_size) // stride + 1)
    else:
        side = square_side(table, encoder.class_token)
        grid = wanted if side is None or side * side == math.prod(wanted) else (side, side)
    class_rows = len(class_positions(token_in_table(encoder.class_token), 0))
    return grid if math.prod(grid) + class_rows == table.shape[1] else None
