"""Masked images: mask tokens after the stem, and maps with hidden positions.

This folder imports encoders.family_registry, encoders.layers and kernels.
"""

from ssmpretrain.encoders.masking.stem import Stem, blank, masked_stem, require_stem, stem_of
from ssmpretrain.encoders.masking.visible_map import VisibleMap, blank_hidden

__all__ = ["Stem", "VisibleMap", "blank", "blank_hidden", "masked_stem", "require_stem", "stem_of"]
