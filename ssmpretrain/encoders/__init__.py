"""Encoders in timm's vocabulary; importing this package registers their names with timm."""

from ssmpretrain.encoders import name_with_arguments as name_with_arguments  # registers a name with timm
from ssmpretrain.encoders.arm.arm import ARMEncoder
from ssmpretrain.encoders.registry import create_encoder, list_encoders
from ssmpretrain.encoders.vim.blocks import VimBlocks
from ssmpretrain.encoders.vim.vim import Vim
from ssmpretrain.encoders.vmamba.vmamba import VMamba
from ssmpretrain.encoders.weights.fill import LoadReport
from ssmpretrain.encoders.weights.load import load_encoder
from ssmpretrain.encoders.weights.save import SaveReport, save_encoder

__all__ = [
    "ARMEncoder",
    "LoadReport",
    "SaveReport",
    "VMamba",
    "Vim",
    "VimBlocks",
    "create_encoder",
    "list_encoders",
    "load_encoder",
    "save_encoder",
]
