"""The base class of objectives that compare features of several views of an image.

Legend: B images, V views of one size, H x W pixels, D encoder width, h x w grid of the last map
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ssmpretrain.encoders.family_registry import family_of
from ssmpretrain.encoders.features.encoded import encode, freeze_unread
from ssmpretrain.objectives.objective import Objective


class JointEmbedding(Objective):
    """Base class of objectives that compare features of several views of an image. Subclasses define the loss.

    A training batch holds the views under "views": one tensor (B, V, 3, H, W) per size, and under "num_global" the
    number of global views, the first ones of the first tensor. All views of one size go through the encoder together.
    """

    reads_views: ClassVar[bool] = True

    def build_encoder(self) -> Any:
        encoder = super().build_encoder()
        family_of(encoder).accept_any_size(encoder)
        freeze_unread(encoder)
        return encoder

    def forward(self, images: Tensor) -> Tensor:
        """Compute features (B, D) of whole images (B, 3, H, W) for evaluation: the global feature of the encoder."""
        return encode(self.encoder, images).vector
