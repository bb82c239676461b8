"""Class tokens in a sequence of patches: their positions; functions that insert, remove and pool them.

The functions serve both a sequence and its position embedding. Both hold one row per patch in raster order, and the
rows of the class tokens lie among them. Registers, which are several class tokens between the patches, have a position
embedding of their own, so the embedding of the patches holds no rows for them (`token_in_table`).

    B batch, K patches, n class tokens, D channels
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from ssmpretrain.base.errors import UserError

ClassToken = Literal["middle", "head", "double", "none", "registers"]
CLASS_TOKENS: tuple[str, ...] = get_args(ClassToken)


def class_positions(class_token: str, num_patches: int, num_registers: int = 0) -> tuple[int, ...]:
    """Return the positions of the class tokens in a sequence of patches and class tokens.

    Args:
        class_token: "middle": one token before patch `num_patches // 2`. "head": one before the first patch. "double":
            one before the first patch and one after the last. "none": no class token. "registers": n tokens, each after
            K // (n + 1) patches; the remaining patches follow the last token. With fewer patches than n + 1, all tokens
            come first.
        num_patches: K, number of patches, at least 0.
        num_registers: n for "registers", at least 1; the other words do not read it.

    Returns:
        Positions, ascending, counted from 0. Their number does not depend on `num_patches`.

    Raises:
        ValueError: If `class_token` is not one of the five words.

    Source: Zhu et al., "Vision Mamba" (arXiv:2401.09417), section 4.4 and table 5; for registers Wang et al.,
        "Mamba-R" (arXiv:2405.14858), and `get_cls_idx` in its code, which fails with fewer patches than n + 1.
    """
    if class_token == "middle":
        return (num_patches // 2,)
    if class_token == "head":
        return (0,)
    if class_token == "double":
        return (0, num_patches + 1)
    if class_token == "none":
        return ()
    if class_token == "registers":
        assert num_registers > 0
        step = num_patches // (num_registers + 1) + 1
        return tuple(range(step - 1, step * num_registers, step))
    raise UserError(f"Vim: class_token is one of {', '.join(CLASS_TOKENS)}; got {class_token!r}.")


def token_in_table(class_token: str) -> str:
    """Return the class token whose rows lie in the position embedding of the patches: "none" for registers."""
    return "none" if class_token == "registers" else class_token


def insert_class_tokens(patches: Tensor, tokens: Tensor, class_token: str) -> Tensor:
    """Insert the class tokens among the patches.

    Args:
        patches: Patches, (B, K, D).
        tokens: Class tokens, (B, n, D), in the order of their positions.
        class_token: As in `class_positions`.

    Returns:
        The sequence, (B, K + n, D).
    """
    pieces, done = [], 0
    for number, position in enumerate(class_positions(class_token, patches.shape[1], tokens.shape[1])):
        patches_before = position - number
        pieces += [patches[:, done:patches_before], tokens[:, number : number + 1]]
        done = patches_before
    return torch.cat([*pieces, patches[:, done:]], dim=1) if pieces else patches


def remove_class_tokens(sequence: Tensor, class_token: str, num_registers: int = 0) -> tuple[Tensor, Tensor]:
    """Split a sequence into patches and class tokens: the inverse of `insert_class_tokens`.

    Args:
        sequence: Patches and class tokens, (B, K + n, D).
        class_token, num_registers: As in `class_positions`.

    Returns:
        The patches, (B, K, D), and the class tokens, (B, n, D).
    """
    positions = _positions_in(sequence, class_token, num_registers)
    if not positions:
        return sequence, sequence[:, :0]
    starts = [0, *(position + 1 for position in positions)]
    ends = [*positions, sequence.shape[1]]
    patches = torch.cat([sequence[:, start:end] for start, end in zip(starts, ends, strict=True)], dim=1)
    return patches, torch.cat([sequence[:, position : position + 1] for position in positions], dim=1)


def pool_tokens(sequence: Tensor, class_token: str, global_pool: str, num_registers: int = 0) -> Tensor:
    """Pool the features of a sequence for the head.

    Args:
        sequence: Features of patches and class tokens, (B, K + n, D).
        class_token, num_registers: As in `class_positions`.
        global_pool: "token" takes the mean of the class tokens, "concat" each of them (the caller reduces and
            concatenates them), "avg" the mean of the patches, "max" all patches (the caller takes the maximum), "" all
            tokens.

    Returns:
        (B, D) for "token" and "avg", (B, n, D) for "concat", (B, K, D) for "max", (B, K + n, D) for "".
    """
    if global_pool == "token":
        positions = _positions_in(sequence, class_token, num_registers)
        return torch.stack([sequence[:, position] for position in positions]).mean(dim=0)
    if global_pool == "":
        return sequence
    patches, tokens = remove_class_tokens(sequence, class_token, num_registers)
    if global_pool == "concat":
        return tokens
    return patches.mean(dim=1) if global_pool == "avg" else patches


def _positions_in(sequence: Tensor, class_token: str, num_registers: int) -> tuple[int, ...]:
    """Return the positions of the class tokens in a sequence that contains them."""
    num_tokens = len(class_positions(class_token, 0, num_registers))
    return class_positions(class_token, sequence.shape[1] - num_tokens, num_registers)
