"""Run an encoder on some patches of each image alone: which encoders can, and how.

B images, L patches, K visible patches, D features
"""

from typing import cast

import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.sequence.pos_embed import sincos_pos_embed
from ssmpretrain.encoders.vim.vim import Vim
from ssmpretrain.encoders.vmamba.vmamba import VMamba

SERVING = "Vim (vim_*), VMamba (vmamba_*), and timm's ViT and DeiT (vit_*, deit_*)"


def patch_side(encoder: nn.Module) -> int | None:
    """Pixels along a patch, what `encode_visible` takes or leaves as one; None if the encoder cannot do without any.

    Raises:
        ValueError: If its patches overlap.
    """
    if isinstance(encoder, VMamba):
        return encoder.patch_stride
    if isinstance(encoder, Vim):
        patch_size, stride = encoder.patch_embed.patch_size, encoder.patch_embed.stride
        if patch_size != stride:
            raise UserError(
                f"patches must not overlap, or some would be hidden in part; got patch_size {patch_size} and "
                f"stride {stride}. Set encoder_args.stride to {patch_size}."
            )
        return patch_size
    if isinstance(encoder, VisionTransformer) and type(encoder.patch_embed) is PatchEmbed:
        height, width = encoder.patch_embed.patch_size
        return int(height) if height == width else None
    return None


def encode_visible(encoder: nn.Module, images: Tensor, keep: Tensor) -> tuple[Tensor | None, Tensor]:
    """Features of the visible patches, from nothing but these.

    Args:
        encoder: One that `patch_side` knows.
        images: (B, 3, H, W), sides multiples of the patch's.
        keep: Raster indices of the visible patches, (B, K), int64, ascending.

    Returns:
        The class token's features (B, D), None without one, and the patches', (B, K, D), both after the final norm.
    """
    features = _forward_visible(encoder, images, keep)
    if isinstance(encoder, VMamba):
        return None, features.squeeze(1)
    if isinstance(encoder, Vim):
        return encoder.split_tokens(features)
    assert isinstance(encoder, VisionTransformer)
    class_token = features[:, 0] if encoder.cls_token is not None else None
    return class_token, features[:, encoder.num_prefix_tokens :]


def pool_visible(encoder: nn.Module, images: Tensor, keep: Tensor) -> Tensor:
    """What the encoder's head reads, (B, D), of the visible patches alone; arguments as for `encode_visible`.

    With all patches visible it is `encoder(images)` of an encoder without a head.
    """
    features = _forward_visible(encoder, images, keep)
    return encoder.forward_head(features, pre_logits=True)  # type: ignore[no-any-return, operator]


def _forward_visible(encoder: nn.Module, images: Tensor, keep: Tensor) -> Tensor:
    """`encoder.forward_features` of the visible patches; a map of VMamba is one row of them."""
    if isinstance(encoder, VMamba):
        return encoder.forward_visible(images, keep).unsqueeze(1)
    if isinstance(encoder, Vim):
        return encoder.forward_tokens(_gather(encoder.embed(images), keep))
    assert isinstance(encoder, VisionTransformer), type(encoder)
    tokens = encoder._pos_embed(encoder.patch_embed(images))
    prefix, patches = tokens[:, : encoder.num_prefix_tokens], tokens[:, encoder.num_prefix_tokens :]
    tokens = encoder.norm_pre(torch.cat([prefix, _gather(patches, keep)], dim=1))
    for block in encoder.blocks:
        tokens = block(tokens)
    return encoder.norm(tokens)  # type: ignore[no-any-return]


def init_weights(encoder: nn.Module) -> None:
    """Draw the initial values of the published masked autoencoders: those of MAE's ViT, and of masked Vim.

    Source: facebookresearch/mae, models_mae.py; insitro/FastVim, models/mae/fastvim_mae.py.
    """
    if not isinstance(encoder, Vim | VisionTransformer):
        return
    projection = cast(nn.Conv2d, encoder.patch_embed.proj)
    projection.reset_parameters()  # of its bias, which is published as PyTorch's
    nn.init.xavier_uniform_(projection.weight.detach().view(len(projection.weight), -1))
    if isinstance(encoder, VisionTransformer):
        init_linear(encoder)
        for token in (encoder.cls_token, encoder.reg_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)


def init_linear(module: nn.Module) -> None:
    """MAE's initial values of linear layers: Xavier-uniform, without biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def fix_positions(encoder: nn.Module) -> None:
    """Make the position embeddings, where there are any, the fixed sine-cosine table, zero for class tokens."""
    if isinstance(encoder, Vim):
        encoder.pos_embed = encoder.initial_pos_embed("sincos")
    elif isinstance(encoder, VisionTransformer) and encoder.pos_embed is not None:
        table = encoder.pos_embed.detach().zero_()
        grid = sincos_pos_embed(encoder.embed_dim, encoder.patch_embed.grid_size)
        table[:, -grid.shape[1] :] = grid
        encoder.pos_embed = nn.Parameter(table, requires_grad=False)


def _gather(tokens: Tensor, keep: Tensor) -> Tensor:
    return tokens.gather(1, keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
