"""VMamba2: VMamba with the scan of Mamba-2, and its registered names for `timm.create_model`.

B batch, H x W positions of a map, C channels, K routes of a scan
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from timm.models import generate_default_cfgs, register_model

from ssmpretrain.encoders.building import build, image_cfg
from ssmpretrain.encoders.layers.state_space import LayerNorm
from ssmpretrain.encoders.vmamba.arguments import GlobalPool, check_sizes, dims_of
from ssmpretrain.encoders.vmamba.blocks import Downsample, NormLayer, Stem
from ssmpretrain.encoders.vmamba.encoder import StagedEncoder
from ssmpretrain.encoders.vmamba2.mixer import CrossSSDMixer
from ssmpretrain.kernels.cross_scan import Mode

__all__ = ["VARIANTS", "VMamba2"]


class VMamba2(StagedEncoder):
    """Encode an image by VMamba's stages with the scan of Mamba-2: one decay for a head instead of one for a state.

    Inside a chunk of positions, the scan is made of matrix products. All routes share B and C. The first stage has one
    position per 4 x 4 pixels; each further stage halves the height and the width of the map. Images of any height and
    width are accepted.

    Args:
        in_chans, num_classes, global_pool, embed_dim, depths, ssm_ratio, d_conv, conv_bias, gate, mlp_ratio, stem,
            downsample, norm_layer, drop_rate, drop_path_rate: As in `VMamba`.
        d_state: States per channel.
        head_dim: Channels that share one decay; it divides ssm_ratio * C of every stage.
        scan: As in `VMamba`, except "cascade".

    Raises:
        ValueError: If an argument is out of range or not one of the listed words.

    Source: Dao & Gu, "Transformers are SSMs" (arXiv:2405.21060); Liu et al., "VMamba: Visual State Space Model"
    (arXiv:2401.10166).
    """

    undecayed: ClassVar[tuple[str, ...]] = (".op.A_logs", ".op.Ds", ".op.dt_bias")

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: GlobalPool = "avg",
        embed_dim: int | Sequence[int] = 96,
        depths: Sequence[int] = (2, 2, 5, 2),
        ssm_ratio: float = 1,
        d_state: int = 16,
        head_dim: int = 32,
        d_conv: int = 3,
        conv_bias: bool = False,
        gate: bool = False,
        mlp_ratio: float = 2,
        stem: Stem = "conv",
        downsample: Downsample = "conv3",
        norm_layer: NormLayer | None = None,
        scan: Mode = "cross",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        dims = dims_of(embed_dim, depths)
        name = type(self).__name__
        check_sizes(name, dims, depths, ssm_ratio, d_conv, in_chans=in_chans, d_state=d_state, head_dim=head_dim)
        norm_layer = norm_layer or LayerNorm

        def mixer(dim: int) -> CrossSSDMixer:
            return CrossSSDMixer(dim, ssm_ratio, d_state, head_dim, d_conv, conv_bias, gate, scan, norm_layer)

        super().__init__(
            mixer,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=dims,
            depths=depths,
            mlp_ratio=mlp_ratio,
            stem=stem,
            downsample=downsample,
            norm_layer=norm_layer,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
        )


# Arguments of each registered name. All other arguments have the defaults of `VMamba2`.
_SHARED = {"ssm_ratio": 1, "d_state": 16, "head_dim": 32, "mlp_ratio": 2, "stem": "conv", "downsample": "conv3"}
VARIANTS: dict[str, dict[str, Any]] = {
    "vmamba2_tiny": {"embed_dim": 96, "depths": (2, 2, 5, 2), **_SHARED},
    "vmamba2_small": {"embed_dim": 96, "depths": (2, 2, 15, 2), **_SHARED},
    "vmamba2_base": {"embed_dim": 128, "depths": (2, 2, 15, 2), **_SHARED},
    "test_vmamba2": {"embed_dim": 16, "depths": (1, 1, 2, 1), **_SHARED, "d_state": 8, "head_dim": 8},
}
_CFG = image_cfg(
    pool_size=(7, 7),
    first_conv="patch_embed.0",
    classifier="classifier.head",
    license="apache-2.0",
    paper_ids=("arXiv:2405.21060", "arXiv:2401.10166"),
)
default_cfgs = generate_default_cfgs(dict.fromkeys(VARIANTS, _CFG))


@register_model
def vmamba2_tiny(pretrained: bool = False, **kwargs: Any) -> VMamba2:
    """VMamba2-T: 16.8 M parameters and 2.9 GMAC at 224 pixels (Swin-T 28.3 and 4.5, VMamba-T[s1l8] 30.2 and 4.8)."""
    return build(VMamba2, "vmamba2_tiny", pretrained, kwargs)


@register_model
def vmamba2_small(pretrained: bool = False, **kwargs: Any) -> VMamba2:
    """VMamba2-S: 26.0 M parameters and 4.9 GMAC at 224 pixels (Swin-S 49.6 and 8.7)."""
    return build(VMamba2, "vmamba2_small", pretrained, kwargs)


@register_model
def vmamba2_base(pretrained: bool = False, **kwargs: Any) -> VMamba2:
    """VMamba2-B: 45.8 M parameters and 8.4 GMAC at 224 pixels (Swin-B 87.8 and 15.4)."""
    return build(VMamba2, "vmamba2_base", pretrained, kwargs)


@register_model
def test_vmamba2(pretrained: bool = False, **kwargs: Any) -> VMamba2:
    """VMamba2 for tests: five blocks of 16 to 128 channels."""
    return build(VMamba2, "test_vmamba2", pretrained, kwargs)
