"""Vim: the bidirectional state-space encoder, with argument names of timm.

Source: Zhu et al., "Vision Mamba" (arXiv:2401.09417). Registers: Wang et al., "Mamba-R: Vision Mamba ALSO Needs
Registers" (arXiv:2405.14858), CVPR 2025.

D channels, n registers
"""

from typing import Any, cast

from timm.models import generate_default_cfgs, register_model

from ssmpretrain.encoders.building import build, image_cfg
from ssmpretrain.encoders.sequence.class_token import ClassToken
from ssmpretrain.encoders.sequence.encoder import PosEmbed, SequenceEncoder
from ssmpretrain.encoders.sequence.head import GlobalPool
from ssmpretrain.encoders.vim.blocks import Bidirectional, VimBlocks
from ssmpretrain.encoders.vim.mixer import BackwardBias, VimMixer


class Vim(SequenceEncoder, VimBlocks):
    """Encode an image by Vision Mamba: every block scans one sequence of patches and a class token in both directions.

    Args:
        img_size: Size of the images in pixels, one number or (height, width). The position embedding has one row for
            each patch of such an image; it is resized for images of other sizes.
        patch_size: Side of a patch in pixels.
        stride: Distance between neighbouring patches in pixels; None means `patch_size`.
        in_chans: Channels of the images.
        num_classes: Outputs of the head; 0 for no head.
        global_pool: Tokens that the head reads. "token": the class token; the mean of both for "double" and of all for
            "registers". "avg": the mean of the patch tokens. "max": every patch token; the largest logit of each class
            is kept. "concat": each register, projected to D / `register_reduction` channels by one linear layer; the
            head reads the RMSNorm of their concatenation, as in supervised Mamba-Reg. "": every token of the sequence.
            None means "token" if there is a class token, else "avg".
        class_token: Place of the class token: "middle" (published), "head", "double" (one at each end), "none", or
            "registers": n tokens between the patches, as in Mamba-Reg, at places that depend on the number of patches.
        num_registers: n, number of registers, at least 1 (Mamba-Reg: 12, or 16 for the large size); 0 for other class
            tokens.
        register_reduction: Factor by which `global_pool="concat"` reduces the channels of each register, a divisor of D
            (Mamba-Reg: 2, 4 and 8 for the small, base and large size). 1 concatenates the registers as they are,
            without projection and norm. Other kinds of pooling do not read it.
        embed_dim: D.
        depth: Number of blocks.
        d_state, expand, d_conv, drop_path_rate, bidirectional, divide_output, flip_probability, backward_dt_bias_init,
            scan_norm: As in `VimBlocks`.
        drop_rate: Dropout on the embedded tokens, in [0, 1).
        pos_embed: "learned" (published), or "sincos" for the fixed sine-cosine table of masked autoencoders.
        layer_decay_pairs: Under layer-wise learning rate decay (`group_matcher`), give each pair of neighbouring blocks
            one learning rate. This is published for masked Vim, which has twice as many blocks as a ViT of its size.
            False gives each block its own learning rate.

    The paper's five classification strategies are `class_token="none"` with `global_pool="avg"` or `"max"`, and the
    class tokens "head", "double" and "middle" with `global_pool="token"`.

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
        depth: int = 24,
        d_state: int = 16,
        expand: float = 2,
        d_conv: int = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        pos_embed: PosEmbed = "learned",
        bidirectional: Bidirectional = "ssm_conv",
        divide_output: bool = True,
        flip_probability: float = 0.5,
        backward_dt_bias_init: BackwardBias = "mamba",
        scan_norm: bool = False,
        layer_decay_pairs: bool = True,
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
            blocks_per_group=2 if layer_decay_pairs else 1,
            depth=depth,
            embed_dim=embed_dim,
            d_state=d_state,
            expand=expand,
            d_conv=d_conv,
            drop_path_rate=drop_path_rate,
            bidirectional=bidirectional,
            divide_output=divide_output,
            flip_probability=flip_probability,
            backward_dt_bias_init=backward_dt_bias_init,
            scan_norm=scan_norm,
        )

    @property
    def mixer(self) -> VimMixer:
        """Return the mixer of the first block; all blocks have the same settings."""
        return cast(VimMixer, self.layers[0].mixer)


# Arguments of each registered name. All other arguments have the defaults of `Vim`.
_MASKED = {"scan_norm": True, "backward_dt_bias_init": "zero"}  # as in insitro/FastVim
MIXER = frozenset(_MASKED)  # names of those arguments that belong to the mixer
_REGISTERS = {"class_token": "registers", "num_registers": 12}  # as in wangf3014/Mamba-Reg
VARIANTS: dict[str, dict[str, Any]] = {
    "vim_tiny_patch16_224": {"embed_dim": 192, "depth": 24},
    "vim_tiny_patch16_stride8_224": {"embed_dim": 192, "depth": 24, "stride": 8},
    "vim_small_patch16_224": {"embed_dim": 384, "depth": 24},
    "vim_small_patch16_stride8_224": {"embed_dim": 384, "depth": 24, "stride": 8},
    "vim_base_patch16_224": {"embed_dim": 768, "depth": 24},
    "vim_base_patch16_stride8_224": {"embed_dim": 768, "depth": 24, "stride": 8},
    "vim_large_patch16_224": {"embed_dim": 1024, "depth": 48},
    "vim_tiny_patch16_scannorm_224": {"embed_dim": 192, "depth": 24, **_MASKED},
    "vim_small_patch16_scannorm_224": {"embed_dim": 384, "depth": 24, **_MASKED},
    "vim_base_patch16_scannorm_224": {"embed_dim": 768, "depth": 24, **_MASKED},
    "vim_large_patch16_scannorm_224": {"embed_dim": 1024, "depth": 48, **_MASKED},
    "vim_tiny_patch16_reg12_224": {"embed_dim": 192, "depth": 24, **_REGISTERS},
    "vim_small_patch16_reg12_224": {"embed_dim": 384, "depth": 24, **_REGISTERS, "register_reduction": 2},
    "vim_base_patch16_reg12_224": {"embed_dim": 768, "depth": 24, **_REGISTERS, "register_reduction": 4},
    "vim_large_patch16_reg16_224": {
        "embed_dim": 1024,
        "depth": 48,
        **_REGISTERS,
        "num_registers": 16,
        "register_reduction": 8,
    },
    "test_vim": {"embed_dim": 32, "depth": 4},
}
_CFG = image_cfg(license="apache-2.0", paper_ids="arXiv:2401.09417", origin_url="https://github.com/hustvl/Vim")
_REGISTERS_CFG = _CFG | {"paper_ids": "arXiv:2405.14858", "origin_url": "https://github.com/wangf3014/Mamba-Reg"}
default_cfgs = generate_default_cfgs({name: _REGISTERS_CFG if "_reg" in name else _CFG for name in VARIANTS})

# Names whose `features_only` gives a pyramid, each with the name of the same encoder without a pyramid.
PYRAMIDS = {
    "vim_tiny_patch16_pyramid_224": "vim_tiny_patch16_224",
    "vim_small_patch16_pyramid_224": "vim_small_patch16_224",
    "vim_base_patch16_pyramid_224": "vim_base_patch16_224",
}
default_cfgs |= generate_default_cfgs(dict.fromkeys(PYRAMIDS, _CFG))


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti: 7.1 M parameters, 197 tokens, published top-1 76.1 %."""
    return build(Vim, "vim_tiny_patch16_224", pretrained, kwargs)


@register_model
def vim_tiny_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti+: overlapping patches, 730 tokens, published top-1 78.3 %."""
    return build(Vim, "vim_tiny_patch16_stride8_224", pretrained, kwargs)


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S: 25.8 M parameters, 197 tokens, published top-1 80.5 %."""
    return build(Vim, "vim_small_patch16_224", pretrained, kwargs)


@register_model
def vim_small_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S+: overlapping patches, 730 tokens, published top-1 81.6 %."""
    return build(Vim, "vim_small_patch16_stride8_224", pretrained, kwargs)


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-B: 97.6 M parameters, 197 tokens, published top-1 81.9 %."""
    return build(Vim, "vim_base_patch16_224", pretrained, kwargs)


@register_model
def vim_base_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-B+: overlapping patches, 730 tokens, top-1 83.2 % in the paper (table 1); no weights were published."""
    return build(Vim, "vim_base_patch16_stride8_224", pretrained, kwargs)


@register_model
def vim_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-L: 48 blocks of 1024 channels, the largest size published for masked pretraining; no supervised weights."""
    return build(Vim, "vim_large_patch16_224", pretrained, kwargs)


@register_model
def vim_tiny_patch16_scannorm_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti with a norm of the scan: 7.2 M parameters, for masked pretraining; published for larger sizes only."""
    return build(Vim, "vim_tiny_patch16_scannorm_224", pretrained, kwargs)


@register_model
def vim_small_patch16_scannorm_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S with a norm of the scan: 25.8 M parameters, for masked pretraining; published for larger sizes only."""
    return build(Vim, "vim_small_patch16_scannorm_224", pretrained, kwargs)


@register_model
def vim_base_patch16_scannorm_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-B with a norm of the scan: 97.7 M parameters, published top-1 83.3 % after masked pretraining."""
    return build(Vim, "vim_base_patch16_scannorm_224", pretrained, kwargs)


@register_model
def vim_large_patch16_scannorm_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-L with a norm of the scan: published top-1 85.1 % after masked pretraining."""
    return build(Vim, "vim_large_patch16_scannorm_224", pretrained, kwargs)


@register_model
def vim_tiny_patch16_reg12_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti with 12 registers: 7.2 M parameters, a size of Mamba-Reg's code without published weights."""
    return build(Vim, "vim_tiny_patch16_reg12_224", pretrained, kwargs)


@register_model
def vim_small_patch16_reg12_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S with 12 registers, Mamba-Reg-S: published top-1 81.4 % with `global_pool="concat"`."""
    return build(Vim, "vim_small_patch16_reg12_224", pretrained, kwargs)


@register_model
def vim_base_patch16_reg12_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-B with 12 registers, Mamba-Reg-B: published top-1 83.0 % with `global_pool="concat"`."""
    return build(Vim, "vim_base_patch16_reg12_224", pretrained, kwargs)


@register_model
def vim_large_patch16_reg16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-L with 16 registers, Mamba-Reg-L: published top-1 83.6 % with `global_pool="concat"`."""
    return build(Vim, "vim_large_patch16_reg16_224", pretrained, kwargs)


@register_model
def vim_tiny_patch16_pyramid_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti whose `features_only` gives maps at strides 4, 8, 16 and 32, as with `feature_cls="pyramid"`."""
    return build(Vim, "vim_tiny_patch16_pyramid_224", pretrained, kwargs)


@register_model
def vim_small_patch16_pyramid_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S whose `features_only` gives maps at strides 4, 8, 16 and 32, as with `feature_cls="pyramid"`."""
    return build(Vim, "vim_small_patch16_pyramid_224", pretrained, kwargs)


@register_model
def vim_base_patch16_pyramid_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-B whose `features_only` gives maps at strides 4, 8, 16 and 32, as with `feature_cls="pyramid"`."""
    return build(Vim, "vim_base_patch16_pyramid_224", pretrained, kwargs)


@register_model
def test_vim(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim for tests: 4 blocks, 32 channels, 0.09 M parameters without the head."""
    return build(Vim, "test_vim", pretrained, kwargs)
