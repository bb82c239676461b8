"""Vim2: a bidirectional encoder with Mamba-2's mixers, with argument names of timm.

The scan of Mamba-2 consists of matrix products, so it runs as fast as the hardware multiplies. No such encoder with
these blocks is published; its neighbours are VSSD (arXiv:2407.18559) and Dino-Mamba (arXiv:2511.18380).

D channels, n registers
"""

from typing import Any, cast

from timm.models import generate_default_cfgs, register_model

from ssmpretrain.encoders.building import build, image_cfg
from ssmpretrain.encoders.sequence.class_token import ClassToken
from ssmpretrain.encoders.sequence.encoder import PosEmbed, SequenceEncoder
from ssmpretrain.encoders.sequence.head import GlobalPool
from ssmpretrain.encoders.vim2.blocks import Vim2Block, Vim2Blocks
from ssmpretrain.encoders.vim2.mixer import Directions, Vim2Mixer


class Vim2(SequenceEncoder, Vim2Blocks):
    """Encode an image by blocks of Mamba-2 mixers and MLPs, which read one sequence of patches and a class token.

    Args:
        img_size, patch_size, stride, in_chans, num_classes, global_pool, class_token, drop_rate, pos_embed,
            num_registers, register_reduction: As in `Vim`.
        embed_dim: D.
        depth: Number of blocks.
        mlp_ratio, attention_blocks, drop_path_rate: As in `Vim2Blocks`.
        d_state, d_conv, expand, head_dim, num_groups, bidirectional, divide_output: As in `Vim2Mixer`.

    Raises:
        ValueError: If an argument is out of range or not one of the listed words, or if two arguments contradict each
            other.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: GlobalPool | None = None,
        class_token: ClassToken = "middle",
        embed_dim: int = 192,
        depth: int = 12,
        mlp_ratio: float = 3,
        attention_blocks: int = 0,
        d_state: int = 64,
        d_conv: int = 4,
        expand: float = 2,
        head_dim: int = 64,
        num_groups: int = 1,
        bidirectional: Directions = "shared",
        divide_output: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        pos_embed: PosEmbed = "learned",
        num_registers: int = 0,
        register_reduction: int = 1,
    ) -> None:
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            stride=stride,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            class_token=class_token,
            drop_rate=drop_rate,
            pos_embed=pos_embed,
            num_registers=num_registers,
            register_reduction=register_reduction,
            depth=depth,
            embed_dim=embed_dim,
            mlp_ratio=mlp_ratio,
            attention_blocks=attention_blocks,
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
            head_dim=head_dim,
            num_groups=num_groups,
            bidirectional=bidirectional,
            divide_output=divide_output,
            drop_path_rate=drop_path_rate,
        )

        self.mlp_ratio, self.expand = mlp_ratio, expand

    @property
    def mixer(self) -> Vim2Mixer | None:
        """Return the mixer of the first block; all mixers have the same settings. None if all blocks have attention."""
        first = cast(Vim2Block, self.layers[0]).mixer
        return first if isinstance(first, Vim2Mixer) else None


# Arguments of each registered name. All other arguments have the defaults of `Vim2`.
_MIXERS = {"depth": 24, "mlp_ratio": 0}  # without MLPs, about as many parameters
_DINO = {**_MIXERS, "bidirectional": "separate"}  # as in yangtiming/Dino-Mamba
_REGISTERS = {"class_token": "registers", "num_registers": 12}
VARIANTS: dict[str, dict[str, Any]] = {
    "vim2_tiny_patch16_224": {"embed_dim": 192, "depth": 12, "mlp_ratio": 3},
    "vim2_small_patch16_224": {"embed_dim": 384, "depth": 12, "mlp_ratio": 3},
    "vim2_base_patch16_224": {"embed_dim": 768, "depth": 12, "mlp_ratio": 3},
    "vim2_tiny_patch16_mixer_224": {"embed_dim": 192, **_MIXERS},
    "vim2_small_patch16_mixer_224": {"embed_dim": 384, **_MIXERS},
    "vim2_base_patch16_mixer_224": {"embed_dim": 768, **_MIXERS},
    "vim2_tiny_patch16_dino_224": {"embed_dim": 256, **_DINO},
    "vim2_small_patch16_dino_224": {"embed_dim": 512, **_DINO},
    "vim2_base_patch16_dino_224": {"embed_dim": 768, **_DINO},
    "vim2_small_patch16_reg12_224": {"embed_dim": 384, "depth": 12, "mlp_ratio": 3, **_REGISTERS},
    "vim2_base_patch16_reg12_224": {"embed_dim": 768, "depth": 12, "mlp_ratio": 3, **_REGISTERS},
    "test_vim2": {"embed_dim": 32, "depth": 4, "mlp_ratio": 2, "d_state": 16, "head_dim": 16},
}
_CFG = image_cfg(license="apache-2.0", paper_ids="arXiv:2405.21060")
_DINO_CFG = _CFG | {"paper_ids": "arXiv:2511.18380", "origin_url": "https://github.com/yangtiming/Dino-Mamba"}
default_cfgs = generate_default_cfgs({name: _DINO_CFG if "_dino_" in name else _CFG for name in VARIANTS})

# Names whose `features_only` gives a pyramid, each with the name of the same encoder without a pyramid.
PYRAMIDS = {
    "vim2_tiny_patch16_pyramid_224": "vim2_tiny_patch16_224",
    "vim2_small_patch16_pyramid_224": "vim2_small_patch16_224",
    "vim2_base_patch16_pyramid_224": "vim2_base_patch16_224",
}
default_cfgs |= generate_default_cfgs(dict.fromkeys(PYRAMIDS, _CFG))


@register_model
def vim2_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim2:
    """Vim2-Ti: 12 mixers and 12 MLPs of 192 channels."""
    return build(Vim2, "vim2_tiny_patch16_224", pretrained, kwargs)


@register_model
def vim2_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim2:
    """Vim2-S: 12 mixers and 12 MLPs of 384 channels."""
    return build(Vim2, "vim2_small_patch16_224", pretrained, kwargs)


@register_model
def vim2_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim2:
    """Vim2-B: 12 mixers and 12 MLPs of 768 channels."""
    return build(Vim2, "vim2_base_patch16_224", pretrained, kwargs)


@register_model
def vim2_tiny_patch16_mixer_224(pretrained: bool = False, **kwargs: Any) -> Vim2:
    """Vim2-Ti of 24 mixers without MLPs."""
    return build(Vim2, "vim2_tiny_patch16_mixer_224", pretrained, kwargs)


@register_model
def vim2_small_patch16_mixer_224(pretrained: bool = False, **kwargs: Any) -> Vim2:
    """Vim2-S of 24 mixers without MLPs."""
    return build(Vim2, "vim2_small_patch16_mixer_224", pretrained, kwargs)


@register_model
def vim2_base_patch16_mixer_224(pretrained: bool = False, **kwargs: Any) -> Vim2:
    """Vim2-B of 24 mixers without MLPs."""
    return build(Vim2, "vim2_base_patch16_mixer_224", pretrained, kwargs)


@register_model
def vim2_tiny_patch16_dino_224(pretrained: bool = False, **kwargs: Any) -> Vim2:
    """Dino-Mamba's Vim-T: 24 mixers of 256 channels; linear top-1 73.7 % after DINO, published."""
    return build(Vim2, "vim2_tiny_patch16_dino_224", pretrained, kwargs)


@register_model
def vim2_small_patch16_dino_224(pretrained: bool = False, **kwargs: Any) -> Vim2:
    """Dino-Mamba's Vim-S: 24 mixers of 512 channels; linear top-1 77.4 % after DINO, published."""
    return build(Vim2, "vim2_small_patch16_dino_224", pretrained, kwargs)


@register_model
def vim2_base_patch16_dino_224(pretrained: bool = False, **kwargs: Any) -> Vim2:
    """Dino-Mamba's Vim-B: 24 mixers of 768 channels; linear top-1 78.1 % after DINO, published."""
    return build(Vim2, "vim2_base_patch16_dino_224", pretrained, kwargs)


@register_model
def vim2_small_patch16_reg12_224(pretrained: bool = False, **kwargs: Any) -> Vim2:
    """Vim2-S with 12 registers between the patches, as in Mamba-Reg."""
    return build(Vim2, "vim2_small_patch16_reg12_224", pretrained, kwargs)


@register_model
def vim2_base_patch16_reg12_224(pretrained: bool = False, **kwargs: Any) -> Vim2:
    """Vim2-B with 12 registers between the patches, as in Mamba-Reg."""
    return build(Vim2, "vim2_base_patch16_reg12_224", pretrained, kwargs)


@register_model
def vim2_tiny_patch16_pyramid_224(pretrained: bool = False, **kwargs: Any) -> Vim2:
    """Vim2-Ti whose `features_only` gives maps at strides 4, 8, 16 and 32, as with `feature_cls="pyramid"`."""
    return build(Vim2, "vim2_tiny_patch16_pyramid_224", pretrained, kwargs)


@register_model
def vim2_small_patch16_pyramid_224(pretrained: bool = False, **kwargs: Any) -> Vim2:
    """Vim2-S whose `features_only` gives maps at strides 4, 8, 16 and 32, as with `feature_cls="pyramid"`."""
    return build(Vim2, "vim2_small_patch16_pyramid_224", pretrained, kwargs)


@register_model
def vim2_base_patch16_pyramid_224(pretrained: bool = False, **kwargs: Any) -> Vim2:
    """Vim2-B whose `features_only` gives maps at strides 4, 8, 16 and 32, as with `feature_cls="pyramid"`."""
    return build(Vim2, "vim2_base_patch16_pyramid_224", pretrained, kwargs)


@register_model
def test_vim2(pretrained: bool = False, **kwargs: Any) -> Vim2:
    """Vim2 for tests: 4 blocks of 32 channels."""
    return build(Vim2, "test_vim2", pretrained, kwargs)
