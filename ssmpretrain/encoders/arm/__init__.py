"""ARM: its encoder MambaMLP, and the family `FAMILY`.

This folder imports encoders.family, encoders.building, encoders.sequence, encoders.layers and Vim's mixer.
"""

from ssmpretrain.encoders.arm.arm import (
    PYRAMIDS,
    VARIANTS,
    ARMBlock,
    ARMEncoder,
    ARMMixer,
    Directions,
    SwiGLU,
    arm_base_patch16_224,
    arm_base_patch16_pyramid_224,
    arm_huge_patch16_224,
    arm_large_patch16_224,
    default_cfgs,
    test_arm,
    transpose_grid,
)
from ssmpretrain.encoders.arm.family import FAMILY

__all__ = [
    "FAMILY",
    "PYRAMIDS",
    "VARIANTS",
    "ARMBlock",
    "ARMEncoder",
    "ARMMixer",
    "Directions",
    "SwiGLU",
    "arm_base_patch16_224",
    "arm_base_patch16_pyramid_224",
    "arm_huge_patch16_224",
    "arm_large_patch16_224",
    "default_cfgs",
    "test_arm",
    "transpose_grid",
]
