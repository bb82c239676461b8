"""Features of encoders of this package and of timm: maps, taps, pooled vectors, pyramid, receptive field.

This folder imports encoders.family_registry and base. It uses only the interface that encoders of timm have.
"""

from ssmpretrain.encoders.features.maps import freeze_after_map, last_map, take_indices
from ssmpretrain.encoders.features.pooled import POOLINGS, Pooled, pooled_features, pooled_width
from ssmpretrain.encoders.features.pyramid import SimplePyramid
from ssmpretrain.encoders.features.receptive_field import ReceptiveField, Square, receptive_field, smallest_square
from ssmpretrain.encoders.features.taps import TappedEncoder, Taps

__all__ = [
    "POOLINGS",
    "Pooled",
    "ReceptiveField",
    "SimplePyramid",
    "Square",
    "TappedEncoder",
    "Taps",
    "freeze_after_map",
    "last_map",
    "pooled_features",
    "pooled_width",
    "receptive_field",
    "smallest_square",
    "take_indices",
]
