"""The base class of objectives that compare features of several views of an image.

Legend: B images, V views of one size, S views of all sizes, H x W pixels, D encoder width
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.family_registry import family_of
from ssmpretrain.encoders.features.encoded import encode
from ssmpretrain.encoders.features.maps import freeze_after_map
from ssmpretrain.objectives.objective import Objective


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
    The encoder reads every size; the sizes are checked before the run starts.

    Images of a validation have one view, so a validation has no loss: callbacks such as `OnlineEvaluation` evaluate
    `forward` there.
    """

    reads_views: ClassVar[bool] = True

    def build_encoder(self) -> Any:
        encoder = super().build_encoder()
        family_of(encoder).accept_any_size(encoder)
        freeze_after_map(encoder)
        return encoder

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
        return Views(list(batch["views"]), int(batch["num_global"]))

    def encode_views(self, sizes: list[Tensor]) -> Tensor:
        """Return the global features (B, S, D) of views, one tensor (B, V, 3, H, W) per size, in their order."""
        encoded = [encode(self.encoder, views.flatten(0, 1)).vector.unflatten(0, views.shape[:2]) for views in sizes]
        return torch.cat(encoded, dim=1)

    def check_view_size(self, size: tuple[int, int]) -> None:
        """Raise a `UserError` if the encoder cannot read views of H, W pixels. A subclass may ask for more."""
        fitting = family_of(self.encoder).tap_size(self.encoder, size)
        if tuple(fitting) != size:
            raise UserError(
                f"{type(self).__name__}: {self.encoder_name} reads views of whole patches; got {size[0]} x {size[1]} "
                f"pixels. Set the size to {fitting[0]} x {fitting[1]}, in data.views or data.image_size."
            )

    # Hooks of Lightning

    def configure_model(self) -> None:
        super().configure_model()
        for group in getattr(self._data, "views", None) or ():
            size = getattr(group, "size", None) or self._data.image_size
            self.check_view_size((size, size) if isinstance(size, int) else (size[0], size[1]))

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Do nothing, because images of a validation have one view; callbacks evaluate the features."""
