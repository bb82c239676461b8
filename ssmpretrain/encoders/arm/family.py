"""ARM's family: its checkpoints, of which those from pretraining scan in one direction and fine-tuned ones in four."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ssmpretrain.encoders.arm.arm import PYRAMIDS, VARIANTS, ARMEncoder
from ssmpretrain.encoders.families import register_family
from ssmpretrain.encoders.family import Adapted
from ssmpretrain.encoders.sequence.encoder import SequenceEncoder
from ssmpretrain.encoders.sequence.family import SequenceFamily
from ssmpretrain.encoders.sequence.pos_embed import merge_pos_embed, square_side

_MLP = re.compile(r"^layers\.(\d+)\.mlp\.w1\.weight$")
_FURTHER_DIRECTION = re.compile(r"\.mixer\.(?:conv1d|x_proj|dt_proj|A|D)_[bc]")
# A forward direction's tensors; the suffix of another direction goes after the first group.
_FORWARD = re.compile(r"(.*\.mixer\.(?:conv1d|x_proj|dt_proj|A|D))((?:\.weight|\.bias|_log)?)")
_FURTHER = ("_b", "_c", "_c_b")


class ARMFamily(SequenceFamily):
    """ARM's encoders; weights of one direction fill an encoder of four."""

    title: ClassVar[str] = "ARM"
    names_like: ClassVar[tuple[str, ...]] = ("arm_*",)
    classes: ClassVar[tuple[type[nn.Module], ...]] = (ARMEncoder,)
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = VARIANTS
    pyramids: ClassVar[Mapping[str, str]] = PYRAMIDS

    def looks_like(self, state: Mapping[str, Tensor]) -> bool:
        """Return whether a tensor has a name that only ARM's gated MLP gives among the encoders with Vim's mixer."""
        return any(_MLP.match(key) for key in state)

    def current_names(self, state: Mapping[str, Tensor], path: Path, asked: Mapping[str, Any]) -> dict[str, Tensor]:
        """Rename the final norm, which the published pretraining code calls `norm_4`."""
        if "norm_f.weight" in state:
            return dict(state)
        return {re.sub(r"^norm_4\.", "norm_f.", key): tensor for key, tensor in state.items()}

    def recognise(self, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Return the arguments of `ARMEncoder` that names and shapes imply, or None if too few tensors are there.

        The number of directions is not among them: weights of one direction serve an encoder with one and, copied, an
        encoder with four.

        Args:
            state: Tensors by the official names; some may be missing.

        Returns:
            embed_dim, depth, d_state, patch_size, in_chans; and img_size when the position embedding is there and
            square.
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

    def describe(self, args: Mapping[str, Any]) -> str:
        sizes = f"{args['embed_dim']} channels, {args['depth']} blocks, patch {args['patch_size']}"
        return f"{self.variant_name(args) or 'an ARM encoder of no registered size'} ({sizes})"

    def adapt(
        self, state: Mapping[str, Tensor], encoder: SequenceEncoder, built_with: Mapping[str, Any] | None
    ) -> Adapted:
        """Give an encoder of four directions copies of the one that the weights have, then resize the positions."""
        copied: tuple[str, ...] = ()
        lacking: frozenset[str] = frozenset()
        one_direction = not any(_FURTHER_DIRECTION.search(key) for key in state)
        if isinstance(encoder, ARMEncoder) and encoder.directions == 4 and one_direction:
            state, copied = four_directions(state)
            lacking = frozenset({"cls_token"} if copied else ())  # one direction has no class token
        return replace(super().adapt(state, encoder, built_with), copied=copied, lacking=lacking)


def four_directions(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return weights of one direction as those of four: each further one starts as a copy of the forward one.

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


FAMILY = register_family(ARMFamily())
