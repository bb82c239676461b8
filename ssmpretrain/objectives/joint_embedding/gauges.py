"""Gauges of an objective with a teacher: entropies, divergence, effective rank; and the limits of a collapsed run.

Legend: B images, T global views, D encoder width, K prototypes
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ssmpretrain.base import ranks
from ssmpretrain.evaluation.features import effective_rank
from ssmpretrain.training.stopping.collapse import CollapseLimit

ONE_DIRECTION = 1.1  # effective rank of features that are nearly equal; 4 to 9 for untrained ViT-S, Vim-S and VMamba-T
ENOUGH = 8  # images of a rank whose effective rank and prototypes are judged


@torch.no_grad()
def entropy(targets: Tensor) -> Tensor:
    """Return the mean entropy of the rows of `targets` (..., K), in nats: ln K if they are uniform, 0 if certain."""
    terms: Tensor = torch.special.entr(targets)
    return terms.sum(dim=-1).mean()


@torch.no_grad()
def divergence_gauges(loss: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return the gauges of every step, which divide the loss, a cross-entropy, into entropy and divergence.

    Args:
        loss: Cross-entropy of the student with the targets.
        targets: Teacher's distributions, (B, T, K).
    """
    of_teacher = entropy(targets)
    return {"teacher_entropy": of_teacher, "kl": loss.detach() - of_teacher}


@torch.no_grad()
def costly_gauges(targets: Tensor, features: Tensor) -> dict[str, Tensor]:
    """Return the gauges that wait for other ranks, or for the device.

    Args:
        targets: Teacher's distributions, (B, T, K).
        features: Teacher's global features of one view, (B, D).
    """
    used = ranks.total(targets.mean(dim=(0, 1))) / ranks.world()
    rank = torch.full((), effective_rank(features), device=features.device)
    return {"prototype_entropy": entropy(used), "effective_rank": rank}


def teacher_limits(num_prototypes: int, images: int) -> list[CollapseLimit]:
    """Return the limits of the gauges of a teacher with K prototypes.

    Args:
        num_prototypes: K.
        images: Images of a rank in one batch. A few images may look alike without a collapse, see `ENOUGH`.
    """
    most = math.log(num_prototypes)
    of_all = [
        CollapseLimit(
            "train/teacher_entropy", 0.999 * most, "above",
            f"the teacher gives all prototypes the same probability (ln K = {most:.4g})",
            "Lower model.teacher_temperature, to a constant 0.02 say, raise model.freeze_last_layer_epochs, or lower "
            "model.num_prototypes.",
        ),
    ]  # fmt: skip
    of_many = [
        CollapseLimit(
            "train/prototype_entropy", 0.1, "below",
            "the teacher gives all images the same prototype",
            "Raise model.teacher_temperature, lower model.centre_momentum, or set model.assign to sinkhorn.",
        ),
        CollapseLimit(
            "train/effective_rank", ONE_DIRECTION, "below",
            "the teacher gives all images nearly the same feature",
            "Lower model.optimizer.lr_per_256, or raise model.momentum.",
        ),
    ]  # fmt: skip
    return of_all + (of_many if images >= ENOUGH else [])
