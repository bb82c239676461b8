"""Cross-entropy of pixels, by both means."""

import math

import pytest
import torch

from ssmpretrain.objectives.dense.pixel_loss import pixel_cross_entropy

# Probabilities of class 0: 1/2, 1/4 and, at a pixel to ignore, 1/8.
ODDS = torch.tensor([[[1.0, 1 / 3, 1 / 7]]])  # (1, 1, 3) against 1
LOGITS = torch.stack([ODDS.log(), torch.zeros_like(ODDS)], dim=1)
CLASSES = torch.tensor([[[0, 0, 255]]], dtype=torch.uint8)


def test_all_divides_by_every_pixel_and_labelled_by_the_labelled_ones() -> None:
    total = math.log(2) + math.log(4)
    assert float(pixel_cross_entropy(LOGITS, CLASSES, "all")) == pytest.approx(total / 3)
    assert float(pixel_cross_entropy(LOGITS, CLASSES, "labelled")) == pytest.approx(total / 2)


@pytest.mark.parametrize("mean", ["all", "labelled"])
def test_a_batch_without_labels_has_loss_0_and_gradient_0(mean: str) -> None:
    logits = LOGITS.clone().requires_grad_()
    loss = pixel_cross_entropy(logits, torch.full_like(CLASSES, 255), mean)
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


def test_the_loss_of_bfloat16_logits_is_summed_in_float32() -> None:
    logits = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    classes = torch.ones(1, 64, 64, dtype=torch.uint8)
    loss = pixel_cross_entropy(logits, classes, "all")
    exact = torch.nn.functional.cross_entropy(logits.double(), classes.long())
    assert loss.dtype == torch.float32 and float(loss) == pytest.approx(float(exact), rel=1e-6)
