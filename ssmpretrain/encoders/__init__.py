"""Encoders and their families. Importing this package registers the names of the encoders with timm.

Each family has a folder. The families share the folders layers, sequence, masking, features and weights. This room
imports kernels and base.
"""

from ssmpretrain.encoders import (  # each of these modules registers encoders
    arm,
    timm_families,
    timm_name,
    vim,
    vim2,
    vmamba,
    vmamba2,
)
from ssmpretrain.encoders.arm import ARMEncoder
from ssmpretrain.encoders.family import Family
from ssmpretrain.encoders.family_registry import families, family_named, family_of, register_family
from ssmpretrain.encoders.registry import create_encoder, list_encoders
from ssmpretrain.encoders.vim import Vim, VimBlocks
from ssmpretrain.encoders.vim2 import Vim2
from ssmpretrain.encoders.vmamba import VMamba
from ssmpretrain.encoders.vmamba2 import VMamba2
from ssmpretrain.encoders.weights.finish import LoadReport
from ssmpretrain.encoders.weights.load import load_encoder
from ssmpretrain.encoders.weights.save import SaveReport, save_encoder

__all__ = [
    "ARMEncoder",
    "Family",
    "LoadReport",
    "SaveReport",
    "VMamba",
    "VMamba2",
    "Vim",
    "Vim2",
    "VimBlocks",
    "arm",
    "create_encoder",
    "families",
    "family_named",
    "family_of",
    "list_encoders",
    "load_encoder",
    "register_family",
    "save_encoder",
    "timm_families",
    "timm_name",
    "vim",
    "vim2",
    "vmamba",
    "vmamba2",
]
