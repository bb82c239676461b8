"""Families of timm's own encoders: ViT and DeiT, Swin, ConvNeXt, MambaOut.

timm creates these encoders and loads their weights. The families here add masked images.
"""

from typing import Any, ClassVar, cast

import torch
from timm.layers.format import Format
from timm.layers.patch_embed import PatchEmbed
from timm.models.convnext import ConvNeXt
from timm.models.mambaout import MambaOut
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ssmpretrain.encoders.family import Family, take_visible
from ssmpretrain.encoders.family_registry import register_family
from ssmpretrain.encoders.sequence.pos_embed import sincos_pos_embed


class ViTFamily(Family):
    """Family of timm's ViT and DeiT."""

    title: ClassVar[str] = "ViT and DeiT"
    names_like: ClassVar[tuple[str, ...]] = ("vit_*", "deit_*")
    is_timms: ClassVar[bool] = True
    classes: ClassVar[tuple[type[nn.Module], ...]] = (VisionTransformer,)
    hides_patches: ClassVar[bool] = True
    has_stem: ClassVar[bool] = True

    def compilable_blocks(self, encoder: VisionTransformer) -> list[nn.Module]:
        return [*encoder.blocks]

    def patch_side(self, encoder: VisionTransformer) -> int | None:
        if type(encoder.patch_embed) is not PatchEmbed:
            return None
        height, width = encoder.patch_embed.patch_size
        return int(height) if height == width else None

    def forward_visible(self, encoder: VisionTransformer, images: Tensor, keep: Tensor) -> Tensor:
        tokens = encoder._pos_embed(encoder.patch_embed(images))
        prefix, patches = tokens[:, : encoder.num_prefix_tokens], tokens[:, encoder.num_prefix_tokens :]
        tokens = encoder.norm_pre(torch.cat([prefix, take_visible(patches, keep)], dim=1))
        for block in encoder.blocks:
            tokens = block(tokens)
        return encoder.norm(tokens)  # type: ignore[no-any-return]

    def class_and_patches(self, encoder: VisionTransformer, features: Tensor) -> tuple[Tensor | None, Tensor]:
        class_token = features[:, 0] if encoder.cls_token is not None else None
        return class_token, features[:, encoder.num_prefix_tokens :]

    def init_for_masking(self, encoder: VisionTransformer) -> None:
        """Set the initial values of MAE, in place.

        Source: facebookresearch/mae, models_mae.py.
        """
        projection = encoder.patch_embed.proj
        projection.reset_parameters()  # the bias keeps PyTorch's initial values, as published
        nn.init.xavier_uniform_(projection.weight.detach().view(len(projection.weight), -1))
        init_linear(encoder)
        for token in (encoder.cls_token, encoder.reg_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)

    def fix_positions(self, encoder: VisionTransformer) -> None:
        if encoder.pos_embed is None:
            return
        table = encoder.pos_embed.detach().zero_()
        grid = sincos_pos_embed(encoder.embed_dim, encoder.patch_embed.grid_size)
        table[:, -grid.shape[1] :] = grid
        encoder.pos_embed = nn.Parameter(table, requires_grad=False)

    def accept_any_size(self, encoder: VisionTransformer) -> None:
        """Set `dynamic_img_size`, as if the encoder had been built with it. timm then resizes the positions."""
        if type(encoder.patch_embed) is PatchEmbed:
            cast(Any, encoder).dynamic_img_size = True
            encoder.patch_embed.strict_img_size = encoder.patch_embed.flatten = False
            encoder.patch_embed.output_fmt = Format.NHWC

    def view_sides(self, encoder: VisionTransformer) -> tuple[int, int] | None:
        """Return the side of a patch, twice; for other patch embeddings, such as those of hybrids, the image size."""
        if (side := self.patch_side(encoder)) is not None:
            return side, side
        size = None if type(encoder.patch_embed) is PatchEmbed else encoder.patch_embed.img_size
        return (int(size[0]), 0) if size and size[0] == size[1] else None

    def stem(self, encoder: VisionTransformer) -> tuple[nn.Module, Format] | None:
        if self.patch_side(encoder) is None:
            return None
        return encoder.patch_embed, Format.NLC if encoder.patch_embed.flatten else encoder.patch_embed.output_fmt


class _Pyramid(Family):
    """Base of timm's families with stages: the sides of an image are multiples of the stride of the last map."""

    def view_sides(self, encoder: Any) -> tuple[int, int]:
        stride: int = encoder.feature_info[-1]["reduction"]
        return stride, stride


class SwinFamily(_Pyramid):
    """Family of timm's Swin, versions 1 and 2."""

    title: ClassVar[str] = "Swin"
    names_like: ClassVar[tuple[str, ...]] = ("swin_*", "swinv2_*")
    is_timms: ClassVar[bool] = True
    classes: ClassVar[tuple[type[nn.Module], ...]] = (SwinTransformer, SwinTransformerV2)
    has_stem: ClassVar[bool] = True
    tap_norm: ClassVar[str] = "fresh"

    def accept_any_size(self, encoder: SwinTransformer | SwinTransformerV2) -> None:
        """Compute the masks of shifted windows for every size.

        Windows keep their size and their shift. A map that they do not cover is padded with zeros, which take part in
        the attention, as in the multi-crop training of iBOT (bytedance/ibot, models/swin_transformer.py).
        """
        encoder.dynamic_img_size, cast(Any, encoder.patch_embed).strict_img_size = True, False
        for block in _blocks(encoder):
            block.dynamic_mask = True

    def prepare_taps(self, encoder: SwinTransformer | SwinTransformerV2) -> None:
        """Accept images of any size, and shift the windows of every second block.

        timm does not shift windows that are as large as the map that the encoder was built for. A larger image has more
        windows there, which would not exchange anything. The published dense code shifts them always.
        """
        self.accept_any_size(encoder)
        for block in _blocks(encoder):
            block.always_partition = True
            block.shift_size = tuple(
                side // 2 if wanted else 0
                for side, wanted in zip(block.window_size, block.target_shift_size, strict=True)
            )

    def stem(self, encoder: SwinTransformer | SwinTransformerV2) -> tuple[nn.Module, Format]:
        return encoder.patch_embed, Format.NHWC


def _blocks(encoder: SwinTransformer | SwinTransformerV2) -> list[Any]:
    return [one for one in encoder.modules() if isinstance(one, SwinTransformerBlock | SwinTransformerV2Block)]


class ConvNeXtFamily(_Pyramid):
    """Family of timm's ConvNeXt."""

    title: ClassVar[str] = "ConvNeXt"
    names_like: ClassVar[tuple[str, ...]] = ("convnext*",)
    is_timms: ClassVar[bool] = True
    classes: ClassVar[tuple[type[nn.Module], ...]] = (ConvNeXt,)
    has_stem: ClassVar[bool] = True
    tap_norm: ClassVar[str] = "fresh"

    def stem(self, encoder: ConvNeXt) -> tuple[nn.Module, Format]:
        return encoder.stem, Format.NCHW

    def pooled_norm_of(self, encoder: ConvNeXt) -> tuple[nn.Module, Format] | None:
        norm = getattr(encoder.head, "norm", None)  # none with `head_norm_first`, which normalises the map
        return None if norm is None or isinstance(norm, nn.Identity) else (norm, Format.NCHW)


class MambaOutFamily(_Pyramid):
    """Family of timm's MambaOut."""

    title: ClassVar[str] = "MambaOut"
    names_like: ClassVar[tuple[str, ...]] = ("mambaout_*",)
    is_timms: ClassVar[bool] = True
    classes: ClassVar[tuple[type[nn.Module], ...]] = (MambaOut,)
    has_stem: ClassVar[bool] = True

    def stem(self, encoder: MambaOut) -> tuple[nn.Module, Format]:
        return encoder.stem, Format.NHWC

    def pooled_norm_of(self, encoder: MambaOut) -> tuple[nn.Module, Format] | None:
        """Return the norm before the hidden layer of the head. The features after that layer belong to the head."""
        return encoder.head.norm, Format.NHWC


def init_linear(module: nn.Module) -> None:
    """Set the initial values of MAE in all linear layers of a module: Xavier-uniform weights, zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


for _family in (MambaOutFamily(), ConvNeXtFamily(), SwinFamily(), ViTFamily()):
    register_family(_family)
