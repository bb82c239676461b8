"""Encoders in timm's vocabulary; importing this package registers their names with timm."""

from . import spelled as spelled  # registers its name
from .arm import ARMEncoder
from .checkpoints import load_encoder
from .export import SaveReport, save_encoder
from .filling import LoadReport
from .registry import create_encoder, list_encoders
from .vim import Vim
from .vim_blocks import VimBlocks
from .vmamba import VMamba

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
