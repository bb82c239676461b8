"""VMamba2: the encoder, its mixer, and the family `FAMILY`.

It imports encoders.{family_registry,building,layers,masking}, VMamba's stages, kernels and base alone.
"""

from ssmpretrain.encoders.vmamba2.family import FAMILY
from ssmpretrain.encoders.vmamba2.mixer import CrossSSDMixer
from ssmpretrain.encoders.vmamba2.vmamba2 import (
    VARIANTS,
    VMamba2,
    default_cfgs,
    test_vmamba2,
    vmamba2_base,
    vmamba2_small,
    vmamba2_tiny,
)

__all__ = [
    "FAMILY",
    "VARIANTS",
    "CrossSSDMixer",
    "VMamba2",
    "default_cfgs",
    "test_vmamba2",
    "vmamba2_base",
    "vmamba2_small",
    "vmamba2_tiny",
]
