"""Base class of the families that read class tokens or registers at any place and hide patches of one sequence.

D channels, M patches
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from timm.layers.format import Format
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.family import take_visible
from ssmpretrain.encoders.sequence.encoder import SequenceEncoder
from ssmpretrain.encoders.sequence.family import SequenceFamily
from ssmpretrain.encoders.sequence.pos_embed import square_side


class MaskedSequenceFamily(SequenceFamily):
    """Base of the families of `SequenceEncoder` whose blocks need nothing but the tokens, all or the visible ones."""

    pooled_norm: ClassVar[str | tuple[str, ...]] = ("neck.", "norm_neck.")
    hides_patches: ClassVar[bool] = True
    has_stem: ClassVar[bool] = True

    # Reading a checkpoint

    def layout(
        self, path: Path, state: Mapping[str, Tensor], found: Mapping[str, Any], asked: Mapping[str, Any], named: bool
    ) -> dict[str, Any]:
        if "pos_embed" not in state:
            return {}  # `fill` will report the missing tensor
        side = square_side(state["pos_embed"], found["class_token"])
        if side is None:
            if "img_size" not in asked:
                rows = state["pos_embed"].shape[1]
                raise UserError(
                    f"load_encoder: {path} has {rows} position rows, which is no square of patches. "
                    "Pass img_size=(height, width) as it was trained."
                )
            return {}
        stride = asked.get("stride", found["patch_size"] if named else found["stride"])
        pixels = (side - 1) * stride + found["patch_size"]
        resizes = "stride" in asked and "img_size" in asked  # with both given, the positions are resized to them
        if stride != found["stride"] and not resizes and asked.get("img_size") not in (pixels, (pixels, pixels)):
            raise UserError(
                f"load_encoder: {path} has positions for {side} x {side} patches and looks like "
                f"{self.describe(found)}; stride {stride} was asked for. Leave `name` and `stride` out; or pass "
                f"img_size={pixels} if it was trained with that; or stride={stride} and img_size={found['img_size']} "
                "to have its positions resized."
            )
        return {"stride": stride, "img_size": pixels}

    # Masked images

    def patch_side(self, encoder: SequenceEncoder) -> int:
        patch_size, stride = encoder.patch_embed.patch_size, encoder.patch_embed.stride
        if patch_size != stride:
            raise UserError(
                f"patches must not overlap, or some would be hidden in part; got patch_size {patch_size} and "
                f"stride {stride}. Set encoder_args.stride to {patch_size}."
            )
        return patch_size

    def forward_visible(self, encoder: SequenceEncoder, images: Tensor, keep: Tensor) -> Tensor:
        """Return the features of the class token and the visible patches, (B, K + n, D).

        A class token in the middle lies before the visible patch K // 2.
        """
        return encoder.forward_tokens(take_visible(encoder.embed(images), keep))

    def class_and_patches(self, encoder: SequenceEncoder, features: Tensor) -> tuple[Tensor | None, Tensor]:
        return encoder.split_tokens(features)

    def init_for_masking(self, encoder: SequenceEncoder) -> None:
        """Initialise the patch projection in place: Xavier-uniform weights, and the bias as in PyTorch.

        Source: insitro/FastVim, models/mae/fastvim_mae.py.
        """
        projection = encoder.patch_embed.proj
        projection.reset_parameters()  # the bias keeps PyTorch's initial values, as published
        nn.init.xavier_uniform_(projection.weight.detach().view(len(projection.weight), -1))

    def fix_positions(self, encoder: SequenceEncoder) -> None:
        encoder.init_positions("sincos")

    def stem(self, encoder: SequenceEncoder) -> tuple[nn.Module, Format] | None:
        self.patch_side(encoder)  # raises an error if patches overlap
        return encoder.patch_embed, Format.NLC

    # Maps for dense tasks

    def tap_class_token_of(self, encoder: SequenceEncoder) -> tuple[bool, ...]:
        """Return the choices; registers stay in the sequence by default, because they keep the patches clean."""
        return (True, False) if encoder.num_registers else self.tap_class_token


def tokens_in(state: Mapping[str, Tensor], embed_dim: int, patch_size: int) -> dict[str, Any]:
    """Return the arguments of an encoder that follow from its class tokens, its head and its position embedding.

    Args:
        state: Tensors by their current names; some may be missing.
        embed_dim: D.
        patch_size: Side of a patch in pixels.

    Returns:
        class_token. With registers also their number and, if the head reads their concatenation, its arguments. If the
        position embedding belongs to a square of patches, also stride and img_size.
    """
    class_token = class_token_in(state)
    return {
        "class_token": class_token,
        **(_registers(state, embed_dim) if class_token == "registers" else {}),
        **_square_layout(square_side(state.get("pos_embed"), class_token), patch_size),
    }


def _square_layout(side: int | None, patch_size: int) -> dict[str, int]:
    if side is None:
        return {}
    half = patch_size // 2
    if half and side == (224 - patch_size) // half + 1:
        return {"stride": half, "img_size": 224}
    return {"stride": patch_size, "img_size": side * patch_size}


def class_token_in(state: Mapping[str, Tensor]) -> str:
    """Return the place of the class token; one token is taken for "middle"."""
    if _register_rows(state) is not None:
        return "registers"
    if "cls_token_head" in state or "cls_token_tail" in state:
        return "double"
    # If the token is missing, one additional position row shows that there was a token. Then `fill` reports the token.
    table = state.get("pos_embed")
    row_to_spare = square_side(table, "none") is None and square_side(table, "middle") is not None
    return "middle" if "cls_token" in state or row_to_spare else "none"


def _register_rows(state: Mapping[str, Tensor]) -> Tensor | None:
    """Return the positions or the values of registers, (1, n, D); None if there are none."""
    tokens = state.get("cls_token")
    several = tokens if tokens is not None and tokens.ndim == 3 and tokens.shape[1] > 1 else None
    return state.get("pos_embed_cls", several)


def _registers(state: Mapping[str, Tensor], embed_dim: int) -> dict[str, Any]:
    """Return the arguments that follow from registers and from a head that reads their concatenation."""
    rows, neck, head = _register_rows(state), state.get("neck.weight"), state.get("head.weight")
    if rows is None or rows.ndim != 3:
        return {}  # `fill` will report the wrong shape
    found = {"num_registers": rows.shape[1]}
    if neck is not None:
        return {**found, "global_pool": "concat", "register_reduction": embed_dim // max(neck.shape[0], 1)}
    joined = head is not None and rows.shape[1] > 1 and head.shape[1:] == (rows.shape[1] * embed_dim,)
    return {**found, "global_pool": "concat", "register_reduction": 1} if joined else found
