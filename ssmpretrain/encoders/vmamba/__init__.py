"""VMamba: the encoder, its blocks, and the family `FAMILY`.

It imports encoders.{family,family_registry,building,features,layers,masking,sequence}, kernels and base alone.
"""

from ssmpretrain.encoders.vmamba.arguments import (
    GLOBAL_POOLS,
    GlobalPool,
)
from ssmpretrain.encoders.vmamba.encoder import Classifier, StagedEncoder
from ssmpretrain.encoders.vmamba.family import FAMILY
from ssmpretrain.encoders.vmamba.model import VMamba
from ssmpretrain.encoders.vmamba.vmamba import (
    VARIANTS,
    default_cfgs,
    test_vmamba,
    vmamba_base_s1l20,
    vmamba_base_s2l15,
    vmamba_base_v0,
    vmamba_small_s1l20,
    vmamba_small_s2l15,
    vmamba_small_v0,
    vmamba_tiny_s1l8,
    vmamba_tiny_s2l5,
    vmamba_tiny_v0,
)

__all__ = [
    "FAMILY",
    "GLOBAL_POOLS",
    "VARIANTS",
    "Classifier",
    "GlobalPool",
    "StagedEncoder",
    "VMamba",
    "default_cfgs",
    "test_vmamba",
    "vmamba_base_s1l20",
    "vmamba_base_s2l15",
    "vmamba_base_v0",
    "vmamba_small_s1l20",
    "vmamba_small_s2l15",
    "vmamba_small_v0",
    "vmamba_tiny_s1l8",
    "vmamba_tiny_s2l5",
    "vmamba_tiny_v0",
]
