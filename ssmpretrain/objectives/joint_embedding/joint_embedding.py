"""The base class of objectives that compare features of several views of an image.

Legend: B images, V views of one size, H x W pixels, D encoder width, h x w grid of the last map
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.family_registry import family_of
from ssmpretrain.encoders.features.encoded import encode, freeze_unread, global_kind
from ssmpretrain.encoders.features.pooled import Pooled
from ssmpretrain.objectives.objective import Objective
from ssmpretrain.training.optim.adamw import OptimizerSettings
from ssmpretrain.training.optim.clipping import clip_each
from ssmpretrain.training.optim.schedules import Schedule


class JointEmbedding(Objective):
    """Base class of objectives that compare features of several views of an image. Subclasses define the loss.

    A training batch holds the views under "views": one tensor (B, V, 3, H, W) per size, and under "num_global" the
    number of global views, the first ones of the first tensor. All views of one size go through the encoder together.

    Args:
        encoder: Name of the encoder; None takes the encoder of `init_from`.
        encoder_args: Further arguments of the encoder; they override those that `init_from` was built with.
        optimizer: Settings of the optimizer; the learning rate scales with the global batch.
        schedule: Warm-up and decay of the learning rate.
        clip_per_tensor: Largest norm of the gradient of each tensor, by itself, see `clip_each`; None does not clip.
            Lightning's `trainer.gradient_clip_val` limits the norm over all tensors instead. The norms are those of the
            averaged gradients, unscaled, after `NonFiniteGuard` has looked at them.
        **settings: Other arguments of the subclass by name, see `Objective`.

    Logs:
        train/clipped: Fraction of the tensors whose gradient was clipped, with `clip_per_tensor`.

    Raises:
        UserError: If `clip_per_tensor` is not above 0, or the trainer clips too.
    """

    reads_views: ClassVar[bool] = True

    def __init__(
        self,
        encoder: str | None,
        encoder_args: dict[str, Any] | None,
        optimizer: OptimizerSettings,
        schedule: Schedule,
        *,
        clip_per_tensor: float | None = None,
        **settings: Any,
    ) -> None:
        if clip_per_tensor is not None and not 0 < clip_per_tensor < math.inf:
            raise UserError(
                f"{type(self).__name__}: clip_per_tensor is finite and above 0; got {clip_per_tensor}. DINO's value is "
                "3.0; null does not clip."
            )
        super().__init__(encoder, encoder_args, optimizer, schedule, clip_per_tensor=clip_per_tensor, **settings)
        self.clip_per_tensor = clip_per_tensor

    def build_encoder(self) -> Any:
        encoder = super().build_encoder()
        family_of(encoder).accept_any_size(encoder)
        freeze_unread(encoder)
        return encoder

    @property
    def pooled(self) -> Pooled:
        """The global feature of the encoder, see `global_kind`."""
        return global_kind(self.encoder)

    def forward(self, images: Tensor) -> Tensor:
        """Compute features (B, D) of whole images (B, 3, H, W) for evaluation: the global feature of the encoder."""
        return encode(self.encoder, images).vector

    # Hooks of Lightning

    def configure_model(self) -> None:
        super().configure_model()
        if self.clip_per_tensor is not None and self.trainer.gradient_clip_val:
            raise UserError(
                f"{type(self).__name__}: gradients are clipped by the norm of each tensor or by the norm of all; got "
                f"model.clip_per_tensor {self.clip_per_tensor} and trainer.gradient_clip_val "
                f"{self.trainer.gradient_clip_val}. Set one of them to null."
            )

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        if self.clip_per_tensor is None:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        norms = clip_each((one for group in optimizer.param_groups for one in group["params"]), self.clip_per_tensor)
        if len(norms):
            self.log("train/clipped", (norms > self.clip_per_tensor).float().mean())
