"""Registered names of VMamba encoders for `timm.create_model`, and the arguments of each name."""

from typing import Any

from timm.models import generate_default_cfgs, register_model

from ssmpretrain.encoders.building import build, image_cfg
from ssmpretrain.encoders.vmamba.model import VMamba

__all__ = ["VARIANTS", "VMamba"]

_V0 = {
    "ssm_ratio": 2,
    "d_state": 16,
    "conv_bias": True,
    "gate": True,
    "mlp_ratio": 0,
    "stem": "patch",
    "downsample": "merge",
}
_S2 = {
    "ssm_ratio": 2,
    "d_state": 1,
    "conv_bias": False,
    "gate": False,
    "mlp_ratio": 4,
    "stem": "conv",
    "downsample": "conv3",
}
_S1 = {**_S2, "ssm_ratio": 1}
# Arguments of each registered name. All other arguments have the defaults of `VMamba`.
VARIANTS: dict[str, dict[str, Any]] = {
    "vmamba_tiny_s1l8": {"embed_dim": 96, "depths": (2, 2, 8, 2), **_S1},
    "vmamba_small_s1l20": {"embed_dim": 96, "depths": (2, 2, 20, 2), **_S1},
    "vmamba_base_s1l20": {"embed_dim": 128, "depths": (2, 2, 20, 2), **_S1},
    "vmamba_tiny_s2l5": {"embed_dim": 96, "depths": (2, 2, 5, 2), **_S2},
    "vmamba_small_s2l15": {"embed_dim": 96, "depths": (2, 2, 15, 2), **_S2},
    "vmamba_base_s2l15": {"embed_dim": 128, "depths": (2, 2, 15, 2), **_S2},
    "vmamba_tiny_v0": {"embed_dim": 96, "depths": (2, 2, 9, 2), **_V0},
    "vmamba_small_v0": {"embed_dim": 96, "depths": (2, 2, 27, 2), **_V0},
    "vmamba_base_v0": {"embed_dim": 128, "depths": (2, 2, 27, 2), **_V0},
    "test_vmamba": {"embed_dim": 16, "depths": (1, 1, 2, 1), **_S1},
}
_CFG = image_cfg(
    pool_size=(7, 7),
    first_conv="patch_embed.0",
    classifier="classifier.head",
    license="mit",
    paper_ids="arXiv:2401.10166",
    origin_url="https://github.com/MzeroMiko/VMamba",
)
default_cfgs = generate_default_cfgs(dict.fromkeys(VARIANTS, _CFG))


@register_model
def vmamba_tiny_s1l8(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T[s1l8]: 30.2 M parameters, published top-1 82.6 %."""
    return build(VMamba, "vmamba_tiny_s1l8", pretrained, kwargs)


@register_model
def vmamba_small_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S[s1l20]: 49.0 M parameters, published top-1 83.3 %."""
    return build(VMamba, "vmamba_small_s1l20", pretrained, kwargs)


@register_model
def vmamba_base_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B[s1l20]: 86.6 M parameters, published top-1 83.8 %."""
    return build(VMamba, "vmamba_base_s1l20", pretrained, kwargs)


@register_model
def vmamba_tiny_s2l5(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T[s2l5]: 30.7 M parameters, published top-1 82.5 %."""
    return build(VMamba, "vmamba_tiny_s2l5", pretrained, kwargs)


@register_model
def vmamba_small_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S[s2l15]: 50.2 M parameters, published top-1 83.6 %."""
    return build(VMamba, "vmamba_small_s2l15", pretrained, kwargs)


@register_model
def vmamba_base_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B[s2l15]: 88.6 M parameters, published top-1 83.9 %."""
    return build(VMamba, "vmamba_base_s2l15", pretrained, kwargs)


@register_model
def vmamba_tiny_v0(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Vanilla VMamba-T, gated, without MLPs: 22.9 M parameters, published top-1 82.2 %."""
    return build(VMamba, "vmamba_tiny_v0", pretrained, kwargs)


@register_model
def vmamba_small_v0(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Vanilla VMamba-S, gated, without MLPs: 44.4 M parameters, published top-1 83.5 %."""
    return build(VMamba, "vmamba_small_v0", pretrained, kwargs)


@register_model
def vmamba_base_v0(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Vanilla VMamba-B, gated, without MLPs: 76.2 M parameters, published top-1 83.7 %."""
    return build(VMamba, "vmamba_base_v0", pretrained, kwargs)


@register_model
def test_vmamba(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba for tests: five blocks of 16 to 128 channels."""
    return build(VMamba, "test_vmamba", pretrained, kwargs)
