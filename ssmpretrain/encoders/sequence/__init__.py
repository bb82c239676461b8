"""Encoders that keep an image as one sequence: base classes, patches, class tokens, position embeddings.

This folder imports encoders.family, encoders.features, encoders.layers, kernels and base, but no single family.
"""

from ssmpretrain.encoders.sequence.block_stack import BlockStack
from ssmpretrain.encoders.sequence.encoder import SequenceEncoder
from ssmpretrain.encoders.sequence.family import SequenceFamily
from ssmpretrain.encoders.sequence.patch_embed import PatchEmbed
from ssmpretrain.encoders.sequence.pos_embed import resize_pos_embed, sincos_pos_embed

__all__ = [
    "BlockStack",
    "PatchEmbed",
    "SequenceEncoder",
    "SequenceFamily",
    "resize_pos_embed",
    "sincos_pos_embed",
]
