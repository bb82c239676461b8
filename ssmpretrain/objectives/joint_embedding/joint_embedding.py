"""The base class of objectives that compare features of several views of an image.

Legend: B images, V views of one size, S views of all sizes, H x W pixels, D encoder width
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.optim import Optimizer

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.family_registry import family_of
from ssmpretrain.encoders.features.encoded import check_view_size, encode, freeze_unread, global_kind
from ssmpretrain.encoders.features.pooled import Pooled
from ssmpretrain.objectives.objective import Objective
from ssmpretrain.training.optim.adamw import OptimizerSettings
from ssmpretrain.training.optim.clipping import clip_each
from ssmpretrain.training.optim.schedules import Schedule
from ssmpretrain.training.stopping.collapse import CollapseGuard, CollapseLimit


class Views(NamedTuple):
    """Views of the images of a batch.

    Attributes:
        sizes: One tensor (B, V, 3, H, W) per size of the views, float32, in the order of the groups in `data.views`.
        num_global: Number of global views: the first views of the first tensor.
    """

    sizes: list[Tensor]
    num_global: int

    @property
    def of_globals(self) -> Tensor:
        """The global views, (B, V, 3, H, W)."""
        return self.sizes[0][:, : self.num_global]


class JointEmbedding(Objective):
    """Base class of objectives that compare features of several views of an image. Subclasses define the loss.

    A training batch holds the views under "views": one tensor (B, V, 3, H, W) per size, and under "num_global" the
    number of global views, the first ones of the first tensor. All views of one size go through the encoder together.
    The sizes of `data.views` are checked before the run starts.

    Images of a validation have one view, so a validation has no loss: callbacks such as `OnlineEvaluation` evaluate
    `forward` there. A `CollapseGuard` watches the gauges that `collapse_limits` names.

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

    @property
    def evaluated_encoder(self) -> Any:
        """The encoder whose features are evaluated and exported: the teacher's, if the objective has a teacher."""
        teacher: Any = getattr(self, "teacher", None)
        return self.encoder if teacher is None else teacher.encoder

    def forward(self, images: Tensor) -> Tensor:
        """Compute the global features (B, D), see `encode`, of whole images (B, 3, H, W) for evaluation.

        With a teacher these are the teacher's, as those of `load_encoder`, `embed` and `knn`.
        """
        return encode(self.evaluated_encoder, images).vector

    def views_of(self, batch: Any) -> Views:
        """Return the views of a training batch.

        Raises:
            UserError: If the batch has no views.
        """
        if not isinstance(batch, Mapping) or not {"views", "num_global"} <= batch.keys():
            got = f"entries {', '.join(batch)}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
            raise UserError(
                f"{type(self).__name__}: a training batch is a dictionary with views and num_global; got {got}. Set "
                "data.views of a data module of ssmpretrain.datamodules."
            )
        views = Views(list(batch["views"]), int(batch["num_global"]))
        if sum(one.shape[1] for one in views.sizes) < 2:
            raise UserError(
                f"{type(self).__name__}: an image has two views or more, to compare them; got 1. Add one to data.views."
            )
        return views

    def encode_views(self, sizes: list[Tensor]) -> Tensor:
        """Return the global features (B, S, D) of views, one tensor (B, V, 3, H, W) per size, in their order."""
        vectors = [encode(self.encoder, views.flatten(0, 1)).vector.view(*views.shape[:2], -1) for views in sizes]
        return torch.cat(vectors, dim=1)

    def collapse_limits(self) -> list[CollapseLimit]:
        """Return the limits of the gauges beyond which a run has collapsed, at the start of training."""
        return []

    def check_image_size(self, size: tuple[int, int]) -> None:
        check_view_size(self.encoder, size)

    # Hooks of Lightning

    def configure_callbacks(self) -> list[Callback]:
        """Add a `CollapseGuard`, unless the trainer has one."""
        chosen = any(isinstance(one, CollapseGuard) for one in self.trainer.callbacks)  # type: ignore[attr-defined]
        return [*super().configure_callbacks(), *([] if chosen else [CollapseGuard()])]

    def configure_model(self) -> None:
        super().configure_model()
        if self.trainer.limit_val_batches:
            self.trainer.limit_val_batches = 1
        for group in getattr(self._data, "views", None) or ():
            check_view_size(self.encoder, getattr(group, "size", None) or self._data.image_size)
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

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Do nothing, because images of a validation have one view; callbacks evaluate the features."""
