"""Tell which ARM encoder a state dict belongs to, and give pretrained weights the directions that they lack."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssmpretrain.encoders.arm.arm import VARIANTS
from ssmpretrain.encoders.sequence.pos_embed import merge_pos_embed, square_side

_MLP = re.compile(r"^layers\.(\d+)\.mlp\.w1\.weight$")
_FURTHER_DIRECTION = re.compile(r"\.mixer\.(?:conv1d|x_proj|dt_proj|A|D)_[bc]")
# A forward direction's tensors; the suffix of another direction goes after the first group.
_FORWARD = re.compile(r"(.*\.mixer\.(?:conv1d|x_proj|dt_proj|A|D))((?:\.weight|\.bias|_log)?)")
_FURTHER = ("_b", "_c", "_c_b")


def looks_like_arm(state: Mapping[str, Tensor]) -> bool:
    """Whether some tensor has a name that only ARM's gated MLP gives among the encoders with Vim's mixer."""
    return any(_MLP.match(key) for key in state)


def current_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under this package's names: the published pretraining code calls the final norm `norm_4`."""
    if "norm_f.weight" in state:
        return dict(state)
    return {re.sub(r"^norm_4\.", "norm_f.", key): tensor for key, tensor in state.items()}


def recognise_arm(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The arguments of `ARMEncoder` that a state dict's names and shapes imply, or None if too little is there to tell.

    The number of directions is not among them: weights of one direction serve an encoder with one and, copied, an
    encoder with four.

    Args:
        state: Tensors by the official names; some may be missing.

    Returns:
        embed_dim, depth, d_state, patch_size, in_chans; and img_size when the position embedding is there and square.
    """
    blocks = [int(match[1]) for key in state if (match := _MLP.match(key))]
    projection = state.get("patch_embed.proj.weight")
    decay = next((tensor for key, tensor in state.items() if key.endswith(".mixer.A_log")), None)
    if not blocks or projection is None or projection.ndim != 4 or decay is None or decay.ndim != 2:
        return None
    embed_dim, in_chans, patch_size, _ = projection.shape
    side = square_side(state.get("pos_embed"), "middle" if "cls_token" in state else "none")
    return {
        "embed_dim": embed_dim,
        "depth": max(blocks) + 1,
        "d_state": decay.shape[1],
        "patch_size": patch_size,
        "in_chans": in_chans,
        **({} if side is None else {"img_size": side * patch_size}),
    }


def arm_variant_name(args: Mapping[str, Any]) -> str | None:
    """The registered name with this width and depth, or None."""
    return next((name for name, sizes in VARIANTS.items() if all(args[key] == sizes[key] for key in sizes)), None)


def describe_arm(args: Mapping[str, Any]) -> str:
    """The registered name, if any, and the sizes, for messages."""
    sizes = f"{args['embed_dim']} channels, {args['depth']} blocks, patch {args['patch_size']}"
    return f"{arm_variant_name(args) or 'an ARM encoder of no registered size'} ({sizes})"


def has_one_direction(state: Mapping[str, Tensor]) -> bool:
    """Whether the mixers of a state dict have a forward direction alone."""
    return not any(_FURTHER_DIRECTION.search(key) for key in state)


def four_directions(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Weights of one direction as those of four: each further one starts as a copy of the forward one.

    The position embedding gets a zero row for the class token, which the weights still lack.

    Returns:
        The state dict, and the names of the copies in it.

    Source: Ren et al. (arXiv:2406.07537), fine-tuning code.
    """
    copies = {
        f"{match[1]}{suffix}{match[2]}": tensor.clone()
        for key, tensor in state.items()
        if (match := _FORWARD.fullmatch(key))
        for suffix in _FURTHER
    }
    table = state.get("pos_embed")
    if table is None or table.ndim != 3:
        return {**state, **copies}, tuple(copies)
    table = merge_pos_embed(table, torch.zeros_like(table[:, :1]), "middle")
    return {**state, **copies, "pos_embed": table}, tuple(copies)
