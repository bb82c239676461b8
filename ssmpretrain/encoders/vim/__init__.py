"""Vim: the encoder, its blocks, a text tower of these blocks, and the family `FAMILY`.

This folder imports encoders.family, encoders.building, encoders.sequence, encoders.layers and kernels; no other family.
"""

from ssmpretrain.encoders.vim.blocks import VimBlocks
from ssmpretrain.encoders.vim.family import FAMILY
from ssmpretrain.encoders.vim.mixer import VimMixer
from ssmpretrain.encoders.vim.text import MambaText
from ssmpretrain.encoders.vim.vim import (
    MIXER,
    PYRAMIDS,
    VARIANTS,
    Vim,
    default_cfgs,
    test_vim,
    vim_base_patch16_224,
    vim_base_patch16_pyramid_224,
    vim_base_patch16_scannorm_224,
    vim_base_patch16_stride8_224,
    vim_large_patch16_224,
    vim_large_patch16_scannorm_224,
    vim_small_patch16_224,
    vim_small_patch16_pyramid_224,
    vim_small_patch16_scannorm_224,
    vim_small_patch16_stride8_224,
    vim_tiny_patch16_224,
    vim_tiny_patch16_pyramid_224,
    vim_tiny_patch16_scannorm_224,
    vim_tiny_patch16_stride8_224,
)

__all__ = [
    "FAMILY",
    "MIXER",
    "PYRAMIDS",
    "VARIANTS",
    "MambaText",
    "Vim",
    "VimBlocks",
    "VimMixer",
    "default_cfgs",
    "test_vim",
    "vim_base_patch16_224",
    "vim_base_patch16_pyramid_224",
    "vim_base_patch16_scannorm_224",
    "vim_base_patch16_stride8_224",
    "vim_large_patch16_224",
    "vim_large_patch16_scannorm_224",
    "vim_small_patch16_224",
    "vim_small_patch16_pyramid_224",
    "vim_small_patch16_scannorm_224",
    "vim_small_patch16_stride8_224",
    "vim_tiny_patch16_224",
    "vim_tiny_patch16_pyramid_224",
    "vim_tiny_patch16_scannorm_224",
    "vim_tiny_patch16_stride8_224",
]
