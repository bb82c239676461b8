"""LeJEPA: views of an image agree, and their projections are distributed as a standard Gaussian.

Legend: B images, V views, G global views, D encoder width, K width of projections
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.features.pooled import pooled_width
from ssmpretrain.evaluation.features import effective_rank
from ssmpretrain.objectives.joint_embedding.gauges import ENOUGH, ONE_DIRECTION
from ssmpretrain.objectives.joint_embedding.joint_embedding import JointEmbedding
from ssmpretrain.objectives.joint_embedding.projector import Projector
from ssmpretrain.objectives.joint_embedding.sigreg import check_knots, random_slices, sigreg
from ssmpretrain.training.optim.adamw import AdamW
from ssmpretrain.training.optim.global_batch import GlobalBatch
from ssmpretrain.training.optim.schedules import Cosine, Schedule
from ssmpretrain.training.stopping.collapse import CollapseLimit, gauges_are_due

_log = logging.getLogger(__name__)
_AT_A_POINT = 0.35  # SIGReg over N: 0.40 if all projections are zero, 0.39 with deviation 0.1, 0.22 with deviation 0.4


class LeJEPA(JointEmbedding):
    """Pull all views of an image to the mean of its global views, and the projections to a standard Gaussian.

    The loss is `w SIGReg + (1 - w) invariance` with w = `sigreg_weight`. There is no teacher, no predictor and no
    stop-gradient: SIGReg alone prevents collapse. See `sigreg` and `invariance`.

    Features of all views go through one projector: linear layers with batch normalisation and ReLU. The normalisation
    takes the views of one size together, of all ranks. So do the published implementations: with views of one size all
    of them, with two sizes first the global views, then the local ones.

    SIGReg compares the images of one batch of all ranks, N, and grows with N. With `trainer.accumulate_grad_batches` it
    sees one batch at a time, so accumulation is weaker than a large batch.

    Two options of the published scripts that the paper does not mention, `teacher_student` and `patch_mask_ratio`, are
    left out.

    Args:
        encoder: Name of the encoder, any with a global feature; None takes the encoder of `init_from`.
        encoder_args: Further arguments of the encoder, e.g. `{drop_path_rate: 0.1}`.
        init_from: Run, checkpoint or file with weights of the encoder; None for fresh weights.
        projector_hidden: Widths of the hidden layers of the projector, one or more.
        projector_dim: K, width of the projections, at least 1.
        sigreg_weight: Weight of SIGReg in [0, 1]; published values are 0.01 to 0.1.
        num_slices: Random directions of SIGReg, drawn anew in each step, at least 1.
        num_knots: Points of its integral, at least 2.
        knot_range: End of its integral, above 0.
        optimizer: Settings of AdamW. The paper's learning rate is 5e-4 for every batch; `lr_per_256` scales with the
            batch, so give 5e-4 * 256 / (global batch). The default is that of the published batch, 512.
        schedule: Warm-up and decay of the learning rate.

    Logs:
        train/loss: The loss.
        train/sigreg: SIGReg, a mean over views. About 1 if projections are Gaussian, 0.4 N if all are zero.
        train/invariance: Mean squared distance of a view's projection to the mean of the global views.
        train/effective_rank: Effective rank of the encoder's features of the first global view of this rank's images,
            between 1 and the smaller of B and D; in the steps that are logged. It falls towards 1 at collapse.

    Raises:
        UserError: If an argument is out of range.

    Source: Balestriero & LeCun, "LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics"
        (arXiv:2511.08544).
    """

    def __init__(
        self,
        encoder: str | None = None,
        encoder_args: dict[str, Any] | None = None,
        init_from: str | None = None,
        projector_hidden: Sequence[int] = (2048, 2048),
        projector_dim: int = 64,
        sigreg_weight: float = 0.05,
        num_slices: int = 1024,
        num_knots: int = 17,
        knot_range: float = 3.0,
        optimizer: AdamW = AdamW(lr_per_256=2.5e-4, betas=(0.9, 0.999)),  # noqa: B008  (read only)
        schedule: Schedule = Cosine(warmup_epochs=1, final_fraction=1e-3),  # noqa: B008
    ) -> None:
        _check(projector_hidden, projector_dim, sigreg_weight, num_slices, num_knots, knot_range)
        super().__init__(
            encoder,
            encoder_args,
            optimizer,
            schedule,
            init_from=init_from,
            projector_hidden=list(projector_hidden),
            projector_dim=projector_dim,
            sigreg_weight=sigreg_weight,
            num_slices=num_slices,
            num_knots=num_knots,
            knot_range=knot_range,
        )
        self.projector_dim, self.sigreg_weight = projector_dim, sigreg_weight
        self.num_slices, self.num_knots, self.knot_range = num_slices, num_knots, knot_range
        self.projector = Projector(pooled_width(self.encoder, self.pooled), projector_hidden, projector_dim)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        views = self.views_of(batch)
        features = self.encode_views(views.sizes)  # (B, V, D)
        projections = self._project(features, [one.shape[1] for one in views.sizes])  # (V, B, K)
        slices = random_slices(self.projector_dim, self.num_slices, self.trainer.global_step, self.device)
        gaussian = sigreg(projections, slices, self.num_knots, self.knot_range)
        apart = invariance(projections, views.num_global)
        loss = self.sigreg_weight * gaussian + (1 - self.sigreg_weight) * apart
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        self.log("train/sigreg", gaussian.detach())  # the same on all ranks
        self.log("train/invariance", apart.detach(), sync_dist=True)
        if gauges_are_due(self.trainer):
            self.log("train/effective_rank", effective_rank(features[:, 0].detach()), sync_dist=True)
        return loss

    def on_train_start(self) -> None:
        batch = GlobalBatch.of(self.trainer)
        images = batch.size // batch.accumulation
        if images < 2:
            raise UserError(
                f"LeJEPA: SIGReg compares the images of a batch, two or more over all ranks; got a batch of {batch}. "
                "Enlarge data.batch_size."
            )
        if batch.accumulation > 1:
            rank_zero_only(_log.warning)(
                "LeJEPA: SIGReg compares the %d images of one batch, not the %d of the step of %d accumulated batches; "
                "its pull grows with that number. Enlarge data.batch_size rather than accumulate.",
                images, batch.size, batch.accumulation,
            )  # fmt: skip

    def _project(self, features: Tensor, counts: list[int]) -> Tensor:
        """Project features (B, V, D) to (V, B, K), float32; `counts` are the numbers of views of each size."""
        parts = [
            self.projector(part.flatten(0, 1)).float().view(*part.shape[:2], -1)
            for part in torch.split(features, counts, dim=1)
        ]
        return torch.cat(parts, dim=1).transpose(0, 1)

    def collapse_limits(self) -> list[CollapseLimit]:
        batch = GlobalBatch.of(self.trainer)
        images = batch.size // batch.accumulation
        remedy = "Raise model.sigreg_weight, or lower model.optimizer.lr_per_256."
        point = f"the projections of all images are nearly one point (SIGReg is then at least 0.4 x {images} images)"
        limits = [CollapseLimit("train/sigreg", _AT_A_POINT * images, "above", point, remedy)]
        if batch.per_device >= ENOUGH:
            same = "the encoder gives all images nearly the same feature"
            limits.append(CollapseLimit("train/effective_rank", ONE_DIRECTION, "below", same, remedy))
        return limits


def invariance(projections: Tensor, num_global: int) -> Tensor:
    """Compute the mean squared distance of projections to the mean of the image's global views.

    The gradient goes through both.

    Args:
        projections: Projections of each view, (V, B, K), the global views first.
        num_global: G, at least 1.

    Returns:
        Mean over views, images and dimensions, a scalar.
    """
    centre = projections[:num_global].mean(0)
    return (projections - centre).square().mean()


def _check(
    projector_hidden: Sequence[int],
    projector_dim: int,
    sigreg_weight: float,
    num_slices: int,
    num_knots: int,
    knot_range: float,
) -> None:
    if not projector_hidden or min(*projector_hidden, projector_dim) < 1:
        raise UserError(
            "LeJEPA: projector_hidden has one width or more, and every width of the projector is at least 1; got "
            f"projector_hidden {list(projector_hidden)} and projector_dim {projector_dim}. Published are [2048, 2048] "
            "and 64."
        )
    if not 0 <= sigreg_weight <= 1:
        raise UserError(f"LeJEPA: sigreg_weight lies in [0, 1]; got {sigreg_weight}. The published value is 0.05.")
    if num_slices < 1:
        raise UserError(f"LeJEPA: num_slices is at least 1; got {num_slices}. The published value is 1024.")
    check_knots("LeJEPA", num_knots, knot_range)
