"""Family of Vim: its checkpoints, masked images, and the export for hustvl/Vim.

D channels, E inner channels, N state, M patches
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.family_registry import register_family
from ssmpretrain.encoders.sequence.class_token import insert_class_tokens
from ssmpretrain.encoders.sequence.head import GLOBAL_POOLS
from ssmpretrain.encoders.sequence.masked_family import MaskedSequenceFamily, class_token_in, tokens_in
from ssmpretrain.encoders.vim.vim import MIXER, PYRAMIDS, VARIANTS, Vim

_BLOCK = re.compile(r"^layers\.(\d+)\.mixer\.")
_ARM_MLP = re.compile(r"^layers\.\d+\.mlp\.w1\.")
_STEP_BIAS = re.compile(r"^layers\.\d+\.mixer\.dt_bias$")  # of Mamba-2's mixer


class VimFamily(MaskedSequenceFamily):
    """Family of Vim, including the variant with a norm of the scan that insitro/FastVim pretrains with masks."""

    title: ClassVar[str] = "Vim"
    names_like: ClassVar[tuple[str, ...]] = ("vim_*",)
    classes: ClassVar[tuple[type[nn.Module], ...]] = (Vim,)
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = VARIANTS
    pyramids: ClassVar[Mapping[str, str]] = PYRAMIDS
    untraceable: ClassVar[Mapping[str, set[str]]] = {
        "bidirectional": {"none", "sequence", "layer"},
        "class_token": {"middle", "head"},
        "global_pool": {*GLOBAL_POOLS},  # of registers; the head may be another one than in the file
    }
    strangers: ClassVar[Mapping[str, str]] = {
        r"mixer\.dt_bias$": "Mamba-2's mixer in the place of Mamba's, a Vim2 encoder (vim2_*)",
        r"^rope\.": "rotary position embedding, a Vim from before February 2024",
        _ARM_MLP.pattern: "a gated MLP in every block, an ARM encoder",
        r"mixer\.gamma$": "layer scale, a Vim trained with init_layer_scale",
        r"^layers\.\d+\.norm\.bias$": "LayerNorm in the place of RMSNorm, a Vim trained with rms_norm=False",
        r"^layers\.\d+\.(blocks|downsample)\.": "stages of blocks, a VMamba or Swin encoder",
        r"^blocks\.\d+\.attn\.": "attention blocks, a ViT",
        r"^stages\.\d+\.": "convolutional stages, such as MambaOut's",
    }
    official_code: ClassVar[str] = "hustvl/Vim"
    official_flag: ClassVar[str] = "--finetune"
    tap_class_token: ClassVar[tuple[bool, ...]] = (False, True)  # the published dense code removes it

    def check_options(self, name: str, options: Mapping[str, Any]) -> None:
        pairs = options.get("bidirectional") == "layer"
        if pairs and options.get("features_only") and options.get("feature_cls") == "hook":
            raise UserError(
                f"{name}: feature_cls='hook' takes what a block gives, and with bidirectional='layer' blocks work in "
                "pairs. Leave feature_cls out."
            )

    # Reading a checkpoint

    def looks_like(self, state: Mapping[str, Tensor]) -> bool:
        if any(_ARM_MLP.match(key) or _STEP_BIAS.match(key) for key in state):
            return False
        return any(_BLOCK.match(key) for key in state)

    def current_names(self, state: Mapping[str, Tensor], path: Path, asked: Mapping[str, Any]) -> dict[str, Tensor]:
        """Move the class token's row of a fixed position table to the middle of the sequence.

        Masked pretraining in insitro/FastVim stores this row, all zeros, before the rows of the patches. FastVim also
        has an encoder of its own, which pools tokens before the scan and is refused. It has the tensors of a Vim with
        `scan_norm`, but no class token.

        Raises:
            ValueError: If the tensors are those of FastVim's encoder.
        """
        if _has_scan_norm(state) and class_token_in(state) == "none" != asked.get("class_token"):
            raise UserError(
                f"load_encoder: {path.name} is not a Vim of this package: a norm of the scan and no class token mean a "
                "FastVim encoder, whose tokens are pooled before the scan. If it is a Vim, pass class_token='none'."
            )
        table = state.get("pos_embed")
        first = table is not None and table.ndim == 3 and table.shape[1] > 1 and not table[:, 0].any()
        if asked.get("class_token", "middle") != "middle" or table is None or not first or "cls_token" not in state:
            return dict(state)
        return {**state, "pos_embed": insert_class_tokens(table[:, 1:], table[:, :1], "middle")}

    def recognise(self, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Return the arguments of `Vim` that follow from names and shapes of tensors; None if too few tensors are left.

        Some arguments cannot be seen in the tensors, so a rule decides. One direction is taken for
        bidirectional="none", though it may be "sequence" or "layer". One class token is taken for "middle". If the
        number of position rows fits patches that overlap by half in 224 x 224 pixels, the stride is half a patch;
        otherwise a square of patches without overlap is assumed.

        Args:
            state: Tensors by their official names; some may be missing.

        Returns:
            embed_dim, depth, d_state, d_conv, expand, bidirectional, scan_norm, class_token, patch_size, in_chans. With
            registers also their number and, if the head reads their concatenation, its arguments. If the position
            embedding belongs to a square of patches, also stride and img_size.
        """
        blocks = [int(match[1]) for key in state if (match := _BLOCK.match(key))]
        projection, decay = state.get("patch_embed.proj.weight"), _first(state, r"A_log$")
        if not blocks or projection is None or projection.ndim != 4 or decay is None or decay.ndim != 2:
            return None
        embed_dim, in_chans, patch_size, _ = projection.shape
        conv = _first(state, r"conv1d\.weight$")
        expand = decay.shape[0] / embed_dim
        return {
            "embed_dim": embed_dim,
            "depth": max(blocks) + 1,
            "d_state": decay.shape[1],
            "d_conv": 4 if conv is None else conv.shape[-1],
            "expand": int(expand) if expand.is_integer() else expand,
            "bidirectional": _directions(state),
            "scan_norm": _has_scan_norm(state),
            "patch_size": patch_size,
            "in_chans": in_chans,
            **tokens_in(state, embed_dim, patch_size),
        }

    def variant_name(self, args: Mapping[str, Any]) -> str | None:
        """Return the registered name of a Vim with these arguments; None if there is no such name.

        Only the width, the depth, the norm of the scan, the registers and, if it is given, the stride are compared.
        """
        for name, variant in VARIANTS.items():
            same_size = variant["embed_dim"] == args["embed_dim"] and variant["depth"] == args["depth"]
            same_mixer = variant.get("scan_norm", False) == args["scan_norm"]
            same_stride = args.get("stride", args["patch_size"]) == variant.get("stride", args["patch_size"])
            same_registers = args.get("num_registers", 0) == variant.get("num_registers", 0)
            if same_size and same_mixer and same_stride and same_registers:
                return name
        return None

    def describe(self, args: Mapping[str, Any]) -> str:
        sizes = f"{args['embed_dim']} channels, {args['depth']} blocks, patch {args['patch_size']}"
        if registers := args.get("num_registers"):
            sizes += f", {registers} registers"
        if "stride" in args:
            sizes += f", stride {args['stride']}, {args['img_size']} pixels"
        return f"{self.variant_name(args) or 'a Vim of no registered size'} ({sizes})"

    def args_under_name(self, name: str, other: str, args: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the arguments that build the encoder of a file under another registered name; None if they cannot.

        Both names must have the same width, depth and registers. If the new name fixes arguments of the mixer, they
        must agree too. The stride then comes from the new name, and the arguments of the mixer come from the file.
        """
        asked, held = self.sizes(name), self.sizes(other)
        said = {"embed_dim", "depth", "class_token", "num_registers", *(asked.keys() & MIXER)}
        if any(asked.get(key) != held.get(key) for key in said):
            return None
        kept = {key: value for key, value in args.items() if key != "stride"}
        return {key: held[key] for key in MIXER if key in held} | kept

    # Masked images

    def decoder_args(self, encoder: Vim) -> dict[str, Any]:
        """Return the arguments of `VimBlocks` that give the decoder the same mixer as the encoder.

        `branch_depth` is the depth of the encoder, as published, although the decoder has fewer blocks.
        """
        mixer = encoder.mixer
        return {
            "scan_norm": mixer.layernorm is not None,
            "backward_dt_bias_init": mixer.backward_dt_bias_init,
            "branch_depth": len(encoder.layers),
        }

    # Maps for dense tasks

    def tap_reads(self, encoder: Vim) -> tuple[str, ...]:
        """Return the two places; only the stream for pairs of blocks, which have two mixers."""
        return ("stream",) if encoder.bidirectional == "layer" else ("stream", "mixer")

    # Export for hustvl/Vim

    def not_official(self, encoder: Vim) -> str | None:
        if encoder.mixer.layernorm is not None:
            return "a Vim with a norm of the scan, which is insitro/FastVim's"
        if encoder.num_registers:
            return (
                "a Vim with registers, which is wangf3014/Mamba-Reg's; that code reads the names of a safetensors file"
            )
        if encoder.num_classes and encoder.num_class_tokens and encoder.global_pool != "token":
            return f"a Vim with class tokens whose head reads global_pool={encoder.global_pool!r} instead"
        return None


def _directions(state: Mapping[str, Tensor]) -> str:
    if _first(state, r"(conv1d_b|x_proj_b|dt_proj_b)\.") is not None:
        return "ssm_conv"
    return "none" if _first(state, r"A_b_log$") is None else "ssm"


def _has_scan_norm(state: Mapping[str, Tensor]) -> bool:
    return _first(state, r"layernorm\.") is not None


def _first(state: Mapping[str, Tensor], pattern: str) -> Tensor | None:
    """Return the first tensor whose name in a mixer starts with a pattern; None if there is none."""
    mixer = re.compile(rf"layers\.\d+\.mixer\.{pattern}")
    return next((tensor for key, tensor in state.items() if mixer.match(key)), None)


FAMILY = register_family(VimFamily())
