"""Gram anchoring: its loss worked by hand in float64, and the steps of its snapshot."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.objectives.joint_embedding.gram import Gram, gram_loss


def cosine(x: Tensor, i: int, j: int) -> Tensor:
    return (x[i] * x[j]).sum() / (x[i].norm() * x[j].norm())


@pytest.mark.parametrize("autocast", [False, True])
def test_the_loss_compares_cosines_of_all_pairs_of_patches_of_a_view(autocast: bool) -> None:
    drawn = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, generator=drawn), torch.randn(2, 3, 4, generator=drawn)
    ours, theirs = student.clone().requires_grad_(), student.double().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = gram_loss(ours, teacher)
    errors = [
        (cosine(view, i, j) - cosine(target, i, j)).square()
        for view, target in zip(theirs, teacher.double(), strict=True) for i in range(3) for j in range(3)
    ]  # fmt: skip
    expected = torch.stack(errors).mean()
    loss.backward()
    expected.backward()
    assert ours.grad is not None and theirs.grad is not None
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (ours.grad - theirs.grad).norm() < 1e-6 * theirs.grad.norm()  # float32: 6e-8 a rounding


def test_the_snapshot_is_taken_and_renewed_at_its_steps() -> None:
    settings = Gram(first_step=5, refresh_steps=3, max_refreshes=2)
    assert [step for step in range(30) if settings.snapshot_due(step)] == [5, 8, 11]


@pytest.mark.parametrize(("changes", "message"), [
    ({"weight": 0.0}, "weight is above 0; got 0.0"),
    ({"first_step": -1}, "first_step is at least 0; got -1"),
    ({"refresh_steps": 0}, "refresh_steps is at least 1; got 0"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Gram(**changes)
