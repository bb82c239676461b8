"""Losses of boxes and masks by hand."""

import math

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder

from ssmpretrain.objectives.dense.detectors.box_losses import box_loss, mask_loss, mask_targets
from ssmpretrain.objectives.dense.detectors.match import MATCHES
from ssmpretrain.objectives.dense.detectors.matching import Samples
from ssmpretrain.objectives.dense.detectors.targets import Target

BOX, OBJECT = torch.tensor([[10.0, 20, 30, 60]]), torch.tensor([[12.0, 20, 32, 60]])  # 2 pixels to the right
STILL = torch.zeros(1, 4)


@pytest.mark.parametrize(("stage", "delta"), [(0, 1.0), (1, 2.0), (2, 3.0)])
def test_a_box_two_pixels_off_has_the_delta_of_its_stage(stage: int, delta: float) -> None:
    coder = BoxCoder(MATCHES["detectron2"].coder_weights[stage])  # 10, 20, 30 times 2 / 20
    assert coder.encode_single(OBJECT, BOX)[0].tolist() == pytest.approx([delta, 0, 0, 0])
    assert box_loss("l1", STILL, BOX, OBJECT, coder, 1.0).item() == pytest.approx(delta)


def test_mmdets_third_stage_divides_by_its_rounded_deviations() -> None:
    coder = BoxCoder(MATCHES["mmdet"].coder_weights[2])
    wider = torch.tensor([[10.0, 20, 30, 20 + 40 * math.e]])
    assert coder.encode_single(wider, BOX)[0, 3].item() == pytest.approx(1 / 0.067)


def test_smooth_l1_turns_into_a_line_at_beta() -> None:
    coder = BoxCoder((1.0, 1.0, 1.0, 1.0))  # the delta of x is 0.1
    assert box_loss("smooth_l1", STILL, BOX, OBJECT, coder, 1 / 9).item() == pytest.approx(0.5 * 0.1**2 * 9)
    far = torch.tensor([[1.1, 0.0, 0.0, 0.0]])  # 1 off
    assert box_loss("smooth_l1", far, BOX, OBJECT, coder, 1 / 9).item() == pytest.approx(1 - 0.5 / 9, rel=1e-5)
    assert box_loss("l1", far, BOX, OBJECT, coder, 1 / 9).item() == pytest.approx(1.0, rel=1e-5)


def test_giou_of_boxes_apart_is_below_zero() -> None:
    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    apart = torch.tensor([[50.0, 20, 70, 60]])  # IoU 0, and 20 of the 60 columns of the hull are in neither
    assert box_loss("giou", STILL, BOX, apart, coder, 1.0).item() == pytest.approx(1 + 1 / 3, rel=1e-5)


def test_no_box_gives_zero_and_a_gradient() -> None:
    deltas = torch.zeros(0, 4, requires_grad=True)
    loss = box_loss("smooth_l1", deltas, torch.zeros(0, 4), torch.zeros(0, 4), BoxCoder((1.0, 1.0, 1.0, 1.0)), 1 / 9)
    torch.autograd.backward(loss)
    assert loss.item() == 0 and deltas.grad is not None


def of_one(box: list[float], classes: int = 0, objects: int = 0) -> Samples:
    return Samples(torch.tensor([box]), torch.tensor([classes]), torch.tensor([objects]), torch.tensor([False]))


def test_mask_targets_are_the_coverage_of_each_pixel_or_its_threshold() -> None:
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[1, 2:6, 2:5] = True  # 3 columns
    target = Target(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), mask)
    box = of_one([2.0, 2.0, 6.0, 6.0], objects=1)
    soft = mask_targets(target, box, 2, aligned=True, threshold=None)[0]
    torch.testing.assert_close(soft, torch.tensor([[1.0, 0.5], [1.0, 0.5]]))
    hard = mask_targets(target, box, 2, aligned=True, threshold=0.5)[0]
    assert hard.tolist() == [[1, 1], [1, 1]]
    assert mask_targets(target, box, 2, aligned=True, threshold=0.6)[0].tolist() == [[1, 0], [1, 0]]


def test_more_objects_than_are_resized_at_once_keep_their_order() -> None:
    masks = torch.zeros(40, 8, 8, dtype=torch.bool)
    masks[::2] = True
    target = Target(torch.zeros(40, 4), torch.zeros(40, dtype=torch.int64), masks)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[1.0, 1, 7, 7]]).repeat(40, 1)
    cropped = mask_targets(target, Samples(boxes, order, order, order > 50), 4, aligned=True, threshold=0.5)
    assert (cropped.mean(dim=(1, 2)) == (order % 2 == 0)).all()


def test_mask_loss_reads_the_class_of_the_box_alone() -> None:
    logits = torch.zeros(1, 3, 2, 2)
    logits[0, 2] = math.log(3)  # probability 3/4
    wanted = torch.tensor([[[1.0, 1.0], [1.0, 0.0]]])
    by_hand = -(3 * math.log(3 / 4) + math.log(1 / 4)) / 4
    assert mask_loss(logits, [of_one([0, 0, 1, 1], classes=2)], [wanted]).item() == pytest.approx(by_hand, rel=1e-6)
    assert mask_loss(logits[:0], [], []).item() == 0
