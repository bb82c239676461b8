"""Vim: model, blocks, and its checkpoints.

It imports encoders.sequence, encoders.layers, encoders.masking, encoders.weights and kernels; no other family.
"""

from ssmpretrain.encoders.vim.blocks import VimBlocks
from ssmpretrain.encoders.vim.vim import Vim

__all__ = ["Vim", "VimBlocks"]
