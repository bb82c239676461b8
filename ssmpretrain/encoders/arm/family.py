"""Family of ARM: its checkpoints, with one direction of scan after pretraining and four after fine-tuning."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.arm.arm import PYRAMIDS, VARIANTS, ARMEncoder
from ssmpretrain.encoders.family import Adapted
from ssmpretrain.encoders.family_registry import register_family
from ssmpretrain.encoders.sequence.class_token import insert_class_tokens
from ssmpretrain.encoders.sequence.encoder import SequenceEncoder
from ssmpretrain.encoders.sequence.family import SequenceFamily
from ssmpretrain.encoders.sequence.pos_embed import square_side

_MLP = re.compile(r"^layers\.(\d+)\.mlp\.w1\.weight$")
_FURTHER_DIRECTION = re.compile(r"\.mixer\.(?:conv1d|x_proj|dt_proj|A|D)_[bc]")
# Names of tensors of the forward direction. Another direction has its suffix after the first group.
_FORWARD = re.compile(r"(.*\.mixer\.(?:conv1d|x_proj|dt_proj|A|D))((?:\.weight|\.bias|_log)?)")
_FURTHER = ("_b", "_c", "_c_b")


class ARMFamily(SequenceFamily):
    """Family of ARM. Weights of one direction can fill an encoder with four directions."""

    title: ClassVar[str] = "ARM"
    names_like: ClassVar[tuple[str, ...]] = ("arm_*",)
    classes: ClassVar[tuple[type[nn.Module], ...]] = (ARMEncoder,)
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = VARIANTS
    pyramids: ClassVar[Mapping[str, str]] = PYRAMIDS

    def looks_like(self, state: Mapping[str, Tensor]) -> bool:
        """Return whether a state dict has a tensor of ARM's gated MLP. No other encoder with Vim's mixer has one."""
        return any(_MLP.match(key) for key in state)

    def current_names(self, state: Mapping[str, Tensor], path: Path, asked: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the tensors with the final norm named `norm_f`; the published pretraining code calls it `norm_4`."""
        if "norm_f.weight" in state:
            return dict(state)
        return {re.sub(r"^norm_4\.", "norm_f.", key): tensor for key, tensor in state.items()}

    def recognise(self, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Return the arguments of `ARMEncoder` that follow from names and shapes; None if too few tensors are left.

        `directions` is left out: weights of one direction fill an encoder with one direction, or, as copies, an encoder
        with four.

        Args:
            state: Tensors by their official names; some may be missing.

        Returns:
            embed_dim, depth, d_state, patch_size, in_chans. If the position embedding belongs to a square of patches,
            also img_size.
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
        """Copy the weights of one direction if the encoder has four, then resize the position embedding.

        Raises:
            UserError: If the weights have four directions and the encoder has one.
        """
        copied: tuple[str, ...] = ()
        lacking: frozenset[str] = frozenset()
        one_direction = not any(_FURTHER_DIRECTION.search(key) for key in state)
        if isinstance(encoder, ARMEncoder) and encoder.directions == 1 and not one_direction:
            raise UserError(
                "load_encoder: directions=1 reads an ARM encoder as pretrained, which has one direction of scan; got a "
                "file with four, as after fine-tuning. Leave directions out, or give the file of the pretraining."
            )
        if isinstance(encoder, ARMEncoder) and encoder.directions == 4 and one_direction:
            state, copied = four_directions(state)
            lacking = frozenset({"cls_token"} if copied else ())  # one direction has no class token
        return replace(super().adapt(state, encoder, built_with), copied=copied, lacking=lacking)


def four_directions(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return weights for four directions from weights of one: the other three are copies of the forward direction.

    The position embedding gets a row of zeros for the class token. The class token itself is not added.

    Args:
        state: Tensors of an ARM encoder with one direction, by their official names.

    Returns:
        The state dict with the copies, and the names of the copies.

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
    table = insert_class_tokens(table, torch.zeros_like(table[:, :1]), "middle")
    return {**state, **copies, "pos_embed": table}, tuple(copies)


FAMILY = register_family(ARMFamily())
