"""Tell which Vim a state dict belongs to, from the names and shapes of its tensors.

D channels, E inner channels, N state, M patches
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.sequence.pos_embed import merge_pos_embed, square_side
from ssmpretrain.encoders.vim.vim import VARIANTS

# Relatives of Vim whose files look alike: a telling part of a tensor's name, and what it means.
_RELATIVES = {
    r"^rope\.": "rotary position embedding, a Vim from before February 2024",
    r"^layers\.\d+\.mlp\.w1\.": "a gated MLP in every block, an ARM encoder",
    r"mixer\.gamma$": "layer scale, a Vim trained with init_layer_scale",
    r"^layers\.\d+\.norm\.bias$": "LayerNorm in the place of RMSNorm, a Vim trained with rms_norm=False",
    r"^layers\.\d+\.(blocks|downsample)\.": "stages of blocks, a VMamba or Swin encoder",
    r"^blocks\.\d+\.attn\.": "attention blocks, a ViT",
    r"^stages\.\d+\.": "convolutional stages, such as MambaOut's",
}


def refuse_relatives(state: Mapping[str, Tensor], where: str, class_token: str | None) -> None:
    """Raise a ValueError that says what it is if a state dict belongs to one of the architectures that resemble Vim.

    FastVim scans pools of tokens, with the tensors of a Vim with `scan_norm`; unlike that, it has no class token.

    Args:
        state: Tensors by the official names.
        where: The file, for the message.
        class_token: The kind that the caller asks for.
    """
    for pattern, meaning in _RELATIVES.items():
        if key := next((key for key in state if re.search(pattern, key)), None):
            raise UserError(f"load_encoder: {where} is not a Vim of this package: {key} means {meaning}.")
    if _has_scan_norm(state) and _class_token(state) == "none" != class_token:
        raise UserError(
            f"load_encoder: {where} is not a Vim of this package: a norm of the scan and no class token mean a FastVim "
            "encoder, whose tokens are pooled before the scan. If it is a Vim, pass class_token='none'."
        )


def class_row_in_place(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with a fixed position table's row of the middle class token at its place in the sequence.

    insitro/FastVim's masked pretraining keeps it, a row of zeros, before the rows of the patches.
    """
    table = state.get("pos_embed")
    first = table is not None and table.ndim == 3 and table.shape[1] > 1 and not table[:, 0].any()
    if table is None or not first or "cls_token" not in state:
        return dict(state)
    return {**state, "pos_embed": merge_pos_embed(table[:, 1:], table[:, :1], "middle")}


def recognise_vim(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The arguments of `Vim` that a state dict's names and shapes imply, or None if too little is there to tell.

    One direction reads as bidirectional="none" ("sequence" and "layer" leave no trace), one class token as "middle". A
    square position embedding reads as 224 x 224 pixels where half-overlapping patches give that many rows, else as
    adjoining patches.

    Args:
        state: Tensors by the official names; some may be missing.

    Returns:
        embed_dim, depth, d_state, d_conv, expand, bidirectional, scan_norm, class_token, patch_size, in_chans; and
        stride and img_size when the position embedding is there and square.
    """
    blocks = [int(match[1]) for key in state if (match := re.match(r"layers\.(\d+)\.mixer\.", key))]
    projection, decay = state.get("patch_embed.proj.weight"), _first(state, r"A_log$")
    if not blocks or projection is None or projection.ndim != 4 or decay is None or decay.ndim != 2:
        return None
    embed_dim, in_chans, patch_size, _ = projection.shape
    conv = _first(state, r"conv1d\.weight$")
    expand = decay.shape[0] / embed_dim
    class_token = _class_token(state)
    return {
        "embed_dim": embed_dim,
        "depth": max(blocks) + 1,
        "d_state": decay.shape[1],
        "d_conv": 4 if conv is None else conv.shape[-1],
        "expand": int(expand) if expand.is_integer() else expand,
        "bidirectional": _directions(state),
        "scan_norm": _has_scan_norm(state),
        "class_token": class_token,
        "patch_size": patch_size,
        "in_chans": in_chans,
        **_layout(square_side(state.get("pos_embed"), class_token), patch_size),
    }


def variant_name(args: Mapping[str, Any]) -> str | None:
    """The registered name with this width, depth, mixer and, if known, stride, or None."""
    for name, variant in VARIANTS.items():
        same_size = variant["embed_dim"] == args["embed_dim"] and variant["depth"] == args["depth"]
        same_mixer = variant.get("scan_norm", False) == args["scan_norm"]
        same_stride = args.get("stride", args["patch_size"]) == variant.get("stride", args["patch_size"])
        if same_size and same_mixer and same_stride:
            return name
    return None


def describe(args: Mapping[str, Any]) -> str:
    """The registered name, if any, and the sizes, for messages."""
    sizes = f"{args['embed_dim']} channels, {args['depth']} blocks, patch {args['patch_size']}"
    if "stride" in args:
        sizes += f", stride {args['stride']}, {args['img_size']} pixels"
    return f"{variant_name(args) or 'a Vim of no registered size'} ({sizes})"


def _layout(side: int | None, patch_size: int) -> dict[str, int]:
    if side is None:
        return {}
    half = patch_size // 2
    if half and side == (224 - patch_size) // half + 1:
        return {"stride": half, "img_size": 224}
    return {"stride": patch_size, "img_size": side * patch_size}


def _directions(state: Mapping[str, Tensor]) -> str:
    if _first(state, r"(conv1d_b|x_proj_b|dt_proj_b)\.") is not None:
        return "ssm_conv"
    return "none" if _first(state, r"A_b_log$") is None else "ssm"


def _class_token(state: Mapping[str, Tensor]) -> str:
    if "cls_token_head" in state or "cls_token_tail" in state:
        return "double"
    # Without its token, a position row too many still tells that there was one, and the load can say what is missing.
    table = state.get("pos_embed")
    row_to_spare = square_side(table, "none") is None and square_side(table, "middle") is not None
    return "middle" if "cls_token" in state or row_to_spare else "none"


def _has_scan_norm(state: Mapping[str, Tensor]) -> bool:
    return _first(state, r"layernorm\.") is not None


def _first(state: Mapping[str, Tensor], pattern: str) -> Tensor | None:
    """The first of the encoder's mixers' tensors whose name goes on with a pattern."""
    mixer = re.compile(rf"layers\.\d+\.mixer\.{pattern}")
    return next((tensor for key, tensor in state.items() if mixer.match(key)), None)
