"""Features of encoders of this package and of timm: maps, taps, pooled vectors, pyramid, receptive field.

This folder imports encoders.family_registry, encoders.masking and base. It uses only the interface that timm's encoders
have.
"""

from ssmpretrain.encoders.features.encoded import (
    Encoded,
    check_view_size,
    encode,
    encode_masked,
    freeze_unread,
    global_kind,
)
from ssmpretrain.encoders.features.maps import freeze_after_map, last_map, normed_map, take_indices
from ssmpretrain.encoders.features.pooled import POOLINGS, Pooled, pooled_features, pooled_width
from ssmpretrain.encoders.features.pyramid import SimplePyramid
from ssmpretrain.encoders.features.receptive_field import ReceptiveField, Square, receptive_field, smallest_square
from ssmpretrain.encoders.features.taps import TappedEncoder, Taps

__all__ = [
    "POOLINGS",
    "Encoded",
    "Pooled",
    "ReceptiveField",
    "SimplePyramid",
    "Square",
    "TappedEncoder",
    "Taps",
    "check_view_size",
    "encode",
    "encode_masked",
    "freeze_after_map",
    "freeze_unread",
    "global_kind",
    "last_map",
    "normed_map",
    "pooled_features",
    "pooled_width",
    "receptive_field",
    "smallest_square",
    "take_indices",
]
