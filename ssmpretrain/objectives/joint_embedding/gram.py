"""Gram anchoring: the patches of a view keep the similarities that they had in an earlier teacher.

Legend: N views, L patches of a view, D encoder width
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmpretrain.base.errors import UserError


@dataclass
class Gram:
    """Settings of Gram anchoring. The defaults are those of DINOv3's 7B model, whose runs have more than 1 M steps.

    The targets come from a snapshot of the teacher, which reads the same global views as the student. In the paper it
    reads them at twice the resolution; that would need a further group of views, and is left out.

    Args:
        weight: Weight of the loss, above 0.
        first_step: Optimizer step, from 0, at which the snapshot is taken and the loss begins, at least 0.
        refresh_steps: Steps after which the snapshot is renewed, at least 1.
        max_refreshes: Number of times that it is renewed, at least 0.

    Raises:
        UserError: If an argument is out of range.

    Source: Simeoni et al., "DINOv3" (arXiv:2508.10104), section 4.2.
    """

    weight: float = 2.0
    first_step: int = 1_010_000
    refresh_steps: int = 10_000
    max_refreshes: int = 3

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise UserError(
                f"Gram: weight is above 0; got {self.weight}. Set model.gram to null for no Gram anchoring."
            )
        for name, least in (("first_step", 0), ("refresh_steps", 1), ("max_refreshes", 0)):
            if getattr(self, name) < least:
                raise UserError(f"Gram: {name} is at least {least}; got {getattr(self, name)}. Correct it.")

    def snapshot_due(self, step: int) -> bool:
        """Return whether the snapshot is taken or renewed before optimizer step `step`, counted from 0."""
        refreshes, rest = divmod(step - self.first_step, self.refresh_steps)
        return rest == 0 and 0 <= refreshes <= self.max_refreshes


def gram_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean squared difference of the cosine similarities between the patches of a view, a scalar.

    Args:
        student, teacher: Features of the patches of the same views, (N, L, D). They are scaled to length 1, and
            computed in float32.
    """
    with torch.autocast(student.device.type, enabled=False):
        ours, theirs = (F.normalize(x.float(), dim=-1) for x in (student, teacher))
        return F.mse_loss(ours @ ours.mT, theirs @ theirs.mT)
