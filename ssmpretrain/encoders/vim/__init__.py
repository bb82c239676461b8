"""Vim: the encoder, its blocks, a text tower of these blocks, and the family `FAMILY`.

This folder imports encoders.family, encoders.building, encoders.sequence, encoders.layers and kernels; no other family.
"""

from ssmpretrain.base.lazy_names import lazy_names
from ssmpretrain.encoders.vim.blocks import VimBlocks
from ssmpretrain.encoders.vim.family import FAMILY
from ssmpretrain.encoders.vim.mixer import VimMixer
from ssmpretrain.encoders.vim.text import MambaText
from ssmpretrain.encoders.vim.vim import Vim

__all__ = ["FAMILY", "MambaText", "Vim", "VimBlocks", "VimMixer"]

__getattr__, __dir__ = lazy_names(__name__, {}, former=("ssmpretrain.encoders.vim.vim",))
