"""Vim2: the encoder with Mamba-2's mixers, its blocks, and the family `FAMILY`.

This folder imports encoders.family, encoders.building, encoders.sequence, encoders.layers and kernels; no other family.
"""

from ssmpretrain.encoders.vim2.blocks import Vim2Block, Vim2Blocks
from ssmpretrain.encoders.vim2.family import FAMILY
from ssmpretrain.encoders.vim2.mixer import Vim2Mixer
from ssmpretrain.encoders.vim2.vim2 import PYRAMIDS, VARIANTS, Vim2, default_cfgs

__all__ = ["FAMILY", "PYRAMIDS", "VARIANTS", "Vim2", "Vim2Block", "Vim2Blocks", "Vim2Mixer", "default_cfgs"]
