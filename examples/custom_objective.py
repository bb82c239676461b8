"""A custom objective in one file: the encoder learns by which angle an image was turned (RotNet).

    python -m ssmpretrain fit --config examples/custom_objective.yaml

`python -m` imports from the current folder, so the recipe names this class as `examples.custom_objective.Rotation`.
Everything else works as with our objectives: `--model.label_smoothing 0.1`, checkpoints, exact resume,
`ssmpretrain.load_encoder("runs/custom_objective")`.

Source: Gidaris et al., "Unsupervised Representation Learning by Predicting Image Rotations" (arXiv:1803.07728).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.features import Pooled, global_kind
from ssmpretrain.objectives import Objective
from ssmpretrain.training import AdamW, Cosine

TURNS = 4  # by 0, 90, 180 and 270 degrees


class Rotation(Objective):
    """Predict by which of four angles an image was turned.

    Args:
        encoder: Name of the encoder: one of `ssmpretrain.list_encoders()`, or one of timm's.
        encoder_args: Further arguments of the encoder.
        label_smoothing: Fraction of the target that is spread over all angles, in [0, 1).
        optimizer: AdamW settings; the learning rate follows the global batch.
        schedule: Warm-up and decay of the learning rate.

    Logs:
        train/loss, val/loss: Cross-entropy in nats; guessing gives log 4 = 1.386.
        val/accuracy: Fraction of the turned images whose angle is predicted correctly; guessing gives 0.25.
    """

    def __init__(
        self,
        encoder: str = "test_vim",
        encoder_args: dict[str, Any] | None = None,
        label_smoothing: float = 0.0,
        optimizer: AdamW = AdamW(),  # noqa: B008  (read only)
        schedule: Cosine = Cosine(),  # noqa: B008
    ) -> None:
        if not 0 <= label_smoothing < 1:
            raise UserError(f"Rotation: label_smoothing is a fraction in [0, 1); got {label_smoothing}. Use 0 or 0.1.")
        # The checkpoint stores the arguments of this class, plain data, with those of all objectives.
        super().__init__(encoder, encoder_args, optimizer, schedule, label_smoothing=label_smoothing)
        self.label_smoothing = label_smoothing
        self.turn_head = nn.Linear(self.encoder.num_features, TURNS)

    @property
    def pooled(self) -> Pooled:
        """The feature that stands for an image, for `OnlineEvaluation`, `knn` and `embed`: the one that is trained."""
        return global_kind(self.encoder)

    def loss(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Turn square images (B, 3, H, H) by all angles; return the loss and the accuracy, both scalars."""
        turned = torch.cat([images.rot90(turns, dims=(2, 3)) for turns in range(TURNS)])  # (4 B, 3, H, H)
        angles = torch.arange(TURNS, device=images.device).repeat_interleave(len(images))
        logits = self.turn_head(self(turned)).float()  # `forward` computes the pooled feature
        loss = F.cross_entropy(logits, angles, label_smoothing=self.label_smoothing)
        return loss, (logits.argmax(dim=1) == angles).float().mean()

    def check_image_size(self, size: tuple[int, int]) -> None:
        if size[0] != size[1]:
            raise UserError(f"Rotation: a turned image keeps its shape if it is square; got {size}. Set image_size.")

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss, _ = self.loss(batch["image"])
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        loss, accuracy = self.loss(batch["image"])
        self.log_dict({"val/loss": loss, "val/accuracy": accuracy}, batch_size=len(batch["image"]), sync_dist=True)
