"""Matching of boxes to objects by hand, and the rule for low overlaps."""

import torch
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from ssmpretrain.objectives.dense.detectors.matching import ObjectMatcher, drawn, label, with_objects
from ssmpretrain.objectives.dense.detectors.targets import Target

ANCHORS = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 20], [50, 0, 60, 10], [80, 80, 90, 90]])


def of(*boxes: list[float]) -> Tensor:
    return torch.tensor(boxes)


def test_an_anchor_is_positive_background_or_neither_by_its_iou() -> None:
    matcher = ObjectMatcher(0.7, 0.3)
    assert matcher.match(ANCHORS, of([0, 0, 10, 10])).tolist() == [0, -2, -1, -1]  # IoU 1, 0.5, 0, 0


def test_an_object_takes_its_best_anchor_also_below_the_threshold() -> None:
    low = of([50, 0, 60, 40])  # IoU 0.25 with anchor 2
    assert ObjectMatcher(0.7, 0.3).match(ANCHORS, low).tolist() == [-1, -1, -1, -1]
    assert ObjectMatcher(0.7, 0.3, True).match(ANCHORS, low).tolist() == [-1, -1, 0, -1]


def test_the_minimum_of_mmdet_keeps_objects_of_low_overlap_without_an_anchor() -> None:
    matcher = ObjectMatcher(0.7, 0.3, True, minimum=0.3)
    assert matcher.match(ANCHORS, of([50, 0, 60, 40])).tolist() == [-1, -1, -1, -1]  # 0.25
    assert matcher.match(ANCHORS, of([50, 0, 60, 30])).tolist() == [-1, -1, 0, -1]  # 1/3


def test_an_object_that_overlaps_nothing_takes_no_anchor() -> None:
    matcher = ObjectMatcher(0.7, 0.3, True)
    assert matcher.match(ANCHORS, of([200, 200, 210, 210])).tolist() == [-1, -1, -1, -1]
    assert matcher.match(ANCHORS, of([200, 200, 210, 210], [0, 0, 10, 10])).tolist() == [1, -2, -1, -1]


def test_a_low_match_goes_to_the_best_object_or_to_the_one_that_took_it() -> None:
    # Anchor 0 overlaps object 0 by 1; object 1 overlaps anchor 0 by 0.4, more than any other anchor.
    objects = of([0, 0, 10, 10], [0, 0, 10, 4])
    assert ObjectMatcher(0.7, 0.3, True, 0.3, to_best=True).match(ANCHORS, objects)[0] == 0
    assert ObjectMatcher(0.7, 0.3, True, 0.3, to_best=False).match(ANCHORS, objects)[0] == 1


def test_without_objects_or_boxes_everything_is_background() -> None:
    matcher = ObjectMatcher(0.5, 0.5, True)
    assert matcher.match(ANCHORS, torch.empty(0, 4)).tolist() == [-1] * 4
    assert matcher.match(torch.empty(0, 4), ANCHORS).tolist() == []


def test_labels_are_the_classes_of_the_matched_objects_and_the_background_is_last() -> None:
    target = Target(of([50.0, 0, 60, 10]), torch.tensor([2]))
    samples = label(ANCHORS, target, ObjectMatcher(0.5, 0.5), background=3)
    assert samples.classes.tolist() == [3, 3, 2, 3] and not samples.added.any()
    samples = with_objects(ANCHORS, target, ObjectMatcher(0.5, 0.5), background=3)
    assert samples.classes.tolist() == [3, 3, 2, 3, 2] and samples.added.tolist() == [False] * 4 + [True]


def test_a_quarter_of_the_drawn_boxes_is_positive_if_there_are_enough() -> None:
    target = Target(of([0.0, 0, 10, 10]), torch.tensor([1]))
    boxes = torch.cat([ANCHORS[:1].repeat(20, 1), ANCHORS[2:].repeat(20, 1)])
    samples = label(boxes, target, ObjectMatcher(0.5, 0.5), background=3)
    some = drawn(samples, BalancedPositiveNegativeSampler(16, 0.25), background=3)
    assert (some.classes == 1).sum() == 4 and len(some.boxes) == 16


def test_crowds_and_boxes_without_a_side_do_not_train() -> None:
    target = Target.of(
        {
            "boxes": of([0.0, 0, 10, 10], [5, 5, 5, 9], [1, 1, 8, 8]).bfloat16(),
            "classes": torch.tensor([0, 1, 2]),
            "crowd": torch.tensor([False, False, True]),
            "masks": torch.zeros(3, 16, 16, dtype=torch.bool),
        }
    )
    assert target.classes.tolist() == [0] and target.boxes.dtype == torch.float32
    assert target.masks is not None and target.masks.shape == (1, 16, 16)
