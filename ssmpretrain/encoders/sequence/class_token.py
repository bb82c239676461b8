"""Class tokens in a sequence of patches: their positions, and how to insert, remove and pool them.

One rule serves the sequence itself and the rows of its position embedding: both hold one entry per patch in raster
order, with the class tokens' entries in between.

    B batch, K patches, n class tokens, D channels
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from ssmpretrain.base.errors import UserError

ClassToken = Literal["middle", "head", "double", "none"]
CLASS_TOKENS: tuple[str, ...] = get_args(ClassToken)


def class_positions(class_token: str, num_patches: int) -> tuple[int, ...]:
    """Return the positions of the class tokens in a sequence of `num_patches` patches plus the class tokens themselves.

    Args:
        class_token: "middle" puts one before patch `num_patches // 2`, "head" one before the first patch, "double" one
            before the first and one after the last patch, "none" puts none.
        num_patches: Number of patches, at least 0.

    Returns:
        Positions, ascending; their number is `len(class_positions(class_token, 0))` whatever the number of patches.

    Raises:
        ValueError: If `class_token` is none of the four.

    Source: Zhu et al., "Vision Mamba" (arXiv:2401.09417), section 4.4 and table 5.
    """
    if class_token == "middle":
        return (num_patches // 2,)
    if class_token == "head":
        return (0,)
    if class_token == "double":
        return (0, num_patches + 1)
    if class_token == "none":
        return ()
    raise UserError(f"Vim: class_token is one of {', '.join(CLASS_TOKENS)}; got {class_token!r}.")


def insert_class_tokens(patches: Tensor, tokens: Tensor, class_token: str) -> Tensor:
    """Put the class tokens at their places among the patches.

    Args:
        patches: (B, K, D).
        tokens: (B, n, D), in the order of their positions.
        class_token: As in `class_positions`.

    Returns:
        The sequence, (B, K + n, D).
    """
    pieces, done = [], 0
    for number, position in enumerate(class_positions(class_token, patches.shape[1])):
        patches_before = position - number
        pieces += [patches[:, done:patches_before], tokens[:, number : number + 1]]
        done = patches_before
    return torch.cat([*pieces, patches[:, done:]], dim=1) if pieces else patches


def remove_class_tokens(sequence: Tensor, class_token: str) -> tuple[Tensor, Tensor]:
    """Take a sequence apart again; the inverse of `insert_class_tokens`.

    Args:
        sequence: (B, K + n, D).
        class_token: As in `class_positions`.

    Returns:
        The patches, (B, K, D), and the class tokens, (B, n, D).
    """
    num_tokens = len(class_positions(class_token, 0))
    if num_tokens == 0:
        return sequence, sequence[:, :0]
    positions = class_positions(class_token, sequence.shape[1] - num_tokens)
    starts = [0, *(position + 1 for position in positions)]
    ends = [*positions, sequence.shape[1]]
    patches = torch.cat([sequence[:, start:end] for start, end in zip(starts, ends, strict=True)], dim=1)
    return patches, torch.cat([sequence[:, position : position + 1] for position in positions], dim=1)


def pool_tokens(sequence: Tensor, class_token: str, global_pool: str) -> Tensor:
    """Take from a sequence of features what a head reads.

    Args:
        sequence: (B, K + n, D).
        class_token: As in `class_positions`.
        global_pool: "token": the mean of the class tokens. "avg": the mean of the patches. "max": every patch. "":
            everything.

    Returns:
        (B, D); (B, K, D) for "max"; the sequence for "".
    """
    if global_pool == "token":
        positions = class_positions(class_token, sequence.shape[1] - len(class_positions(class_token, 0)))
        return torch.stack([sequence[:, position] for position in positions]).mean(dim=0)
    if global_pool == "":
        return sequence
    patches, _ = remove_class_tokens(sequence, class_token)
    return patches.mean(dim=1) if global_pool == "avg" else patches
