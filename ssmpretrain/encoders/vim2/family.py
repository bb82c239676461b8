"""Family of Vim2: its checkpoints, those of Dino-Mamba, and masked images.

D channels, E inner channels, H heads, G groups, N state
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.family_registry import register_family
from ssmpretrain.encoders.sequence.head import GLOBAL_POOLS
from ssmpretrain.encoders.sequence.masked_family import MaskedSequenceFamily, tokens_in
from ssmpretrain.encoders.vim2.blocks import Vim2Blocks
from ssmpretrain.encoders.vim2.vim2 import PYRAMIDS, VARIANTS, Vim2

_BLOCK = re.compile(r"^layers\.(\d+)\.mixer\.")
_STEP_BIAS = re.compile(r"^layers\.\d+\.mixer\.dt_bias$")


class Vim2Family(MaskedSequenceFamily):
    """Family of Vim2. Files with the tensors of Dino-Mamba's encoders are recognised too."""

    title: ClassVar[str] = "Vim2"
    names_like: ClassVar[tuple[str, ...]] = ("vim2_*",)
    classes: ClassVar[tuple[type[nn.Module], ...]] = (Vim2,)
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = VARIANTS
    pyramids: ClassVar[Mapping[str, str]] = PYRAMIDS
    untraceable: ClassVar[Mapping[str, set[str]]] = {
        "class_token": {"middle", "head"},
        "global_pool": {*GLOBAL_POOLS},  # of registers; the head may be another one than in the file
    }
    strangers: ClassVar[Mapping[str, str]] = {
        r"mixer\.x_proj\.": "Mamba's first mixer, a Vim encoder (vim_*)",
        r"^layers\.\d+\.norm\.bias$": "LayerNorm in the place of RMSNorm",
    }

    # Reading a checkpoint

    def looks_like(self, state: Mapping[str, Tensor]) -> bool:
        return any(_STEP_BIAS.match(key) for key in state)

    def recognise(self, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Return the arguments of `Vim2` that follow from names and shapes of tensors; None if too few are left.

        Some arguments cannot be seen in the tensors, so a rule decides: one group of heads; one class token is taken
        for "middle"; the sum of two directions is halved.

        Args:
            state: Tensors by their official names; some may be missing.

        Returns:
            embed_dim, depth, mlp_ratio, attention_blocks, d_state, d_conv, expand, head_dim, bidirectional, patch_size,
            in_chans, and the arguments of `tokens_in`.
        """
        projection = state.get("patch_embed.proj.weight")
        decays, out, conv = (_first(state, name) for name in ("A_log", "out_proj.weight", "conv1d.weight"))
        if projection is None or projection.ndim != 4 or decays is None or out is None or conv is None:
            return None
        if decays.ndim != 1 or out.ndim != 2 or conv.ndim != 3:
            return None
        blocks = [int(match[1]) for key in state if (match := _BLOCK.match(key))]
        embed_dim, in_chans, patch_size, _ = projection.shape
        hidden = state.get("layers.0.mlp.fc1.weight")
        inner = out.shape[1]
        return {
            "embed_dim": embed_dim,
            "depth": max(blocks) + 1,
            "mlp_ratio": 0 if hidden is None else _plain(hidden.shape[0] / embed_dim),
            "attention_blocks": sum(key.endswith(".mixer.qkv.weight") for key in state),
            "d_state": (conv.shape[0] - inner) // 2,
            "d_conv": conv.shape[2],
            "expand": _plain(inner / embed_dim),
            "head_dim": inner // decays.shape[0],
            "bidirectional": _directions(state),
            "patch_size": patch_size,
            "in_chans": in_chans,
            **tokens_in(state, embed_dim, patch_size),
        }

    def variant_name(self, args: Mapping[str, Any]) -> str | None:
        """Return the registered name of a Vim2 with these arguments; None if there is no such name.

        Width, depth, MLPs, kind of directions and registers are compared.
        """
        compared = {"depth": 12, "mlp_ratio": 3, "bidirectional": "shared", "num_registers": 0}
        for name, variant in VARIANTS.items():
            settings = {**compared, **variant}
            if all(args.get(key, default) == settings[key] for key, default in {**compared, "embed_dim": 0}.items()):
                return name
        return None

    def describe(self, args: Mapping[str, Any]) -> str:
        sizes = f"{args['embed_dim']} channels, {args['depth']} blocks, MLP ratio {args['mlp_ratio']}"
        if registers := args.get("num_registers"):
            sizes += f", {registers} registers"
        return f"{self.variant_name(args) or 'a Vim2 of no registered size'} ({sizes}, patch {args['patch_size']})"

    def layout(
        self, path: Path, state: Mapping[str, Tensor], found: Mapping[str, Any], asked: Mapping[str, Any], named: bool
    ) -> dict[str, Any]:
        """Return stride and image size; see `Family.layout`.

        Raises:
            UserError: As there; and if the file looks like Dino-Mamba's, whose sequence is another one.
        """
        if not named and found["bidirectional"] == "separate" and found["class_token"] == "middle":
            name = self.variant_name(found) or "vim2_small_patch16_dino_224"
            raise UserError(
                f"load_encoder: {path.name} has the tensors of Dino-Mamba, whose sequence holds the class token twice, "
                f"at its start and before patch 97; a Vim2 holds it once. Pass name={name!r} if a Vim2 was saved, or "
                "to take Dino-Mamba's weights for a sequence with one class token."
            )
        return super().layout(path, state, found, asked, named)

    # Masked images

    def decoder(self, encoder: Vim2, depth: int, width: int) -> nn.Module:
        """Return blocks with the encoder's kind of mixer and MLP; their heads are as wide as `width` allows."""
        block, mixer = encoder.layers[0], encoder.mixer
        settings: dict[str, Any] = {"mlp_ratio": 0 if block.mlp is None else encoder.mlp_ratio}
        if mixer is not None:
            names = ("d_state", "d_conv", "head_dim", "num_groups", "bidirectional", "divide_output")
            settings |= {name: getattr(mixer, name) for name in names} | {"expand": encoder.expand}
        return Vim2Blocks(depth, width, branch_depth=len(encoder.layers), **settings)

    # Maps for dense tasks

    def tap_reads(self, encoder: Vim2) -> tuple[str, ...]:
        return ("stream", "mixer")


def _directions(state: Mapping[str, Tensor]) -> str:
    if _first(state, "conv1d_b.weight") is not None:
        return "separate"
    return "none" if _first(state, "A_log_b") is None else "shared"


def _first(state: Mapping[str, Tensor], name: str) -> Tensor | None:
    """Return the tensor of that name in the first mixer that has it; None if there is none."""
    mixer = re.compile(rf"layers\.\d+\.mixer\.{re.escape(name)}$")
    return next((tensor for key, tensor in state.items() if mixer.match(key)), None)


def _plain(ratio: float) -> float | int:
    return int(ratio) if ratio.is_integer() else ratio


FAMILY = register_family(Vim2Family())
