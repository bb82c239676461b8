"""Gauges of an objective with a teacher, and the limits of a collapsed run."""

import math

import pytest
import torch

from ssmpretrain.objectives.joint_embedding.gauges import costly_gauges, divergence_gauges, entropy, teacher_limits
from ssmpretrain.objectives.joint_embedding.losses import dino_loss


def test_entropy_is_ln_k_if_uniform_and_0_if_certain() -> None:
    assert entropy(torch.full((2, 3, 8), 1 / 8)).item() == pytest.approx(math.log(8))
    assert entropy(torch.eye(4)).item() == 0


def test_the_loss_is_entropy_plus_divergence() -> None:
    logits = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    targets = (logits[:, :2] / 0.5).softmax(dim=-1)
    loss = dino_loss(logits, targets, 0.5)
    gauges = divergence_gauges(loss, targets)
    assert gauges["kl"].item() > 0
    assert sum(value.item() for value in gauges.values()) == pytest.approx(loss.item())
    alike = logits[:, :1].expand(-1, 4, -1)  # all views of an image have the logits of the targets
    same = (alike[:, :2] / 0.5).softmax(dim=-1)
    assert divergence_gauges(dino_loss(alike, same, 0.5), same)["kl"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "passed"), [("uniform", 0), ("one prototype", 1), ("one feature", 2), ("healthy", None)]
)
def test_each_kind_of_collapse_passes_its_limit_alone(kind: str, passed: int | None) -> None:
    targets, features = torch.eye(16).view(8, 2, 16), torch.eye(8)
    if kind == "uniform":
        targets = torch.full((8, 2, 16), 1 / 16)
    if kind == "one prototype":
        targets = torch.eye(16)[:1].expand(8, 2, 16)
    if kind == "one feature":
        features = torch.ones(8, 8) + 1e-4 * features
    gauges = {**divergence_gauges(torch.tensor(0.0), targets), **costly_gauges(targets, features)}
    beyond = [
        limit.is_passed(gauges[limit.gauge.removeprefix("train/")].item()) for limit in teacher_limits(16, images=8)
    ]
    assert [number for number, one in enumerate(beyond) if one] == ([] if passed is None else [passed])


def test_few_images_that_look_alike_are_no_collapse() -> None:
    assert [limit.gauge for limit in teacher_limits(16, images=7)] == ["train/teacher_entropy"]
