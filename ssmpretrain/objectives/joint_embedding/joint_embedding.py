"""The base class of objectives that compare features of several views of an image.

Legend: B images, V views of one size, H x W pixels, D encoder width, h x w grid of the last map
"""

from __future__ import annotations

from typing import Any, ClassVar

from lightning.pytorch import Callback
from torch import Tensor

from ssmpretrain.encoders.family_registry import family_of
from ssmpretrain.encoders.features.encoded import encode
from ssmpretrain.encoders.features.maps import freeze_after_map
from ssmpretrain.objectives.objective import Objective
from ssmpretrain.training.stopping.collapse import CollapseGuard, CollapseLimit


class JointEmbedding(Objective):
    """Base class of objectives that compare features of several views of an image. Subclasses define the loss.

    A training batch holds the views under "views": one tensor (B, V, 3, H, W) per size, and under "num_global" the
    number of global views, the first ones of the first tensor. All views of one size go through the encoder together.
    """

    reads_views: ClassVar[bool] = True

    def build_encoder(self) -> Any:
        encoder = super().build_encoder()
        family_of(encoder).accept_any_size(encoder)
        freeze_after_map(encoder)
        return encoder

    def forward(self, images: Tensor) -> Tensor:
        """Compute features (B, D) of whole images (B, 3, H, W) for evaluation: the global feature of the encoder."""
        return encode(self.encoder, images).vector

    def collapse_limits(self) -> list[CollapseLimit]:
        """Return the limits of the gauges beyond which a run has collapsed, at the start of training."""
        return []

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Do nothing, because images of a validation have one view; callbacks evaluate the features."""

    def configure_callbacks(self) -> list[Callback]:
        """Add a `CollapseGuard`, unless the trainer has one."""
        chosen = any(isinstance(one, CollapseGuard) for one in self.trainer.callbacks)  # type: ignore[attr-defined]
        return [*super().configure_callbacks(), *([] if chosen else [CollapseGuard()])]
