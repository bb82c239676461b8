"""Anchors and proposals: by hand, and equal to torchvision's network by its rules."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from ssmpretrain.objectives.dense.detectors.match import MATCHES
from ssmpretrain.objectives.dense.detectors.proposals import Anchors, ProposalNetwork
from ssmpretrain.objectives.dense.detectors.settings import Proposals
from ssmpretrain.objectives.dense.detectors.targets import Target

STRIDES = [4, 8, 16, 32, 64]
SIZES = [(128, 128), (100, 120)]


def maps(side: int = 128, width: int = 8) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, width, side // s, side // s) for s in STRIDES]


def targets() -> list[Target]:
    boxes = torch.tensor([[10.0, 20, 50, 70], [60, 60, 120, 100]])
    return [Target(boxes, torch.tensor([0, 1])), Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))]


def network(match: str = "torchvision", **settings: Any) -> ProposalNetwork:
    torch.manual_seed(0)
    return ProposalNetwork(8, STRIDES, Proposals(**settings), MATCHES[match])


def test_anchors_are_eight_strides_wide_and_rounded_only_by_torchvisions_rules() -> None:
    for match, width in (("torchvision", 46.0), ("mmdet", 32 * 2**0.5), ("detectron2", 32 * 2**0.5)):
        first = network(match).anchor_generator.on(maps())[0][0]  # ratio 1/2 at position 0, 0
        assert (first[2] - first[0]).item() == pytest.approx(width) and first[0] == -first[2]


def test_anchors_follow_the_stride_also_on_maps_of_odd_size() -> None:
    anchors = Anchors([[8.0], [16.0]], [1.0], [4, 8], rounded=False)
    fine, coarse = anchors.on([torch.zeros(1, 1, 11, 13), torch.zeros(1, 1, 6, 7)])
    assert fine[-1].tolist() == [48 - 4, 40 - 4, 48 + 4, 40 + 4] and coarse[-1].tolist() == [40, 32, 56, 48]


@pytest.mark.parametrize("convs", [1, 2])
def test_losses_and_proposals_equal_torchvisions(convs: int) -> None:
    ours = network(convs=convs)
    anchors = AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5)
    number = {"training": 2000, "testing": 1000}
    theirs = RegionProposalNetwork(anchors, RPNHead(8, 3, convs), 0.7, 0.3, 256, 0.5, number, number, 0.7)
    theirs.load_state_dict(ours.state_dict())
    features, images = maps(), ImageList(torch.zeros(2, 3, 128, 128), SIZES)
    torch.manual_seed(2)
    boxes, losses = ours(features, SIZES, targets())
    torch.manual_seed(2)
    named = {str(i): one for i, one in enumerate(features)}
    expected, parts = theirs(images, named, [{"boxes": one.boxes} for one in targets()])
    torch.testing.assert_close(boxes, expected)
    torch.testing.assert_close(list(losses.values()), list(parts.values()))


def test_detectron2_divides_by_the_quota_and_the_others_by_the_sampled_anchors() -> None:
    few = [torch.zeros(1, 8, 1, 1) for _ in STRIDES]  # 15 anchors
    none = [Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))]
    for match, expected in (("torchvision", 0.6931), ("mmdet", 0.6931), ("detectron2", 0.6931 * 15 / 256)):
        model = network(match)
        torch.nn.init.zeros_(model.head.cls_logits.weight)
        _, losses = model(few, [(64, 64)], none)
        assert losses["objectness"].item() == pytest.approx(expected, rel=1e-3)
        assert losses["proposals"].item() == 0


def test_as_many_proposals_remain_in_training_as_the_rules_say() -> None:
    for match, number in (("torchvision", 2000), ("mmdet", 1000)):
        rules = replace(MATCHES[match], proposals_kept=MATCHES[match].proposals_kept // 100)
        model = ProposalNetwork(8, STRIDES, Proposals(), rules)
        assert [len(boxes) for boxes in model(maps(), SIZES)[0]] == [number // 100] * 2


def test_an_object_that_overlaps_no_anchor_makes_no_anchor_positive() -> None:
    target = [Target(torch.tensor([[5000.0, 5000, 5010, 5010]]), torch.tensor([0]))] * 2
    for match in MATCHES:
        _, losses = network(match)(maps(), SIZES, target)
        assert losses["proposals"].item() == 0


def test_proposals_stay_inside_the_image_without_its_padding() -> None:
    boxes, _ = network()(maps(), SIZES)
    assert boxes[1][:, 2].max() <= 120 and boxes[1][:, 3].max() <= 100
