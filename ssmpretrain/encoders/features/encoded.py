"""One pass of an encoder: one vector per image, and the map of its patches."""

from typing import NamedTuple

from torch import Tensor, nn

from ssmpretrain.encoders.family_registry import family_of
from ssmpretrain.encoders.features.pooled import Pooled, last_blocks, pool


class Encoded(NamedTuple):
    """Features of images.

    Attributes:
        vector: Global features, (B, D), see `global_kind`.
        map: Features of the patches, (B, D, h, w), after the final norm.
    """

    vector: Tensor
    map: Tensor


def global_kind(encoder: nn.Module) -> Pooled:
    """Return the kind of pooled feature that stands for an image: the class token, or the mean without one."""
    return Pooled("class" if family_of(encoder).has_class_token(encoder) else "mean")


def encode(encoder: nn.Module, images: Tensor) -> Encoded:
    """Return the features of images (B, 3, H, W) in one pass of the encoder."""
    kind = global_kind(encoder)
    blocks = last_blocks(encoder, images, [kind])
    return Encoded(pool(encoder, blocks, [kind])[kind], blocks[-1].map)
