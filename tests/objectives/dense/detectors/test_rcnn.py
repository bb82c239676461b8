"""Mask R-CNN and its cascade: equal to torchvision by its rules, and what the other rules change."""

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign

from ssmpretrain.objectives.dense.detectors.match import MATCHES, Match
from ssmpretrain.objectives.dense.detectors.rcnn import RCNN
from ssmpretrain.objectives.dense.detectors.settings import BoxHead, Detector, MaskHead
from ssmpretrain.objectives.dense.detectors.targets import Target

STRIDES, WIDTH, K = [4, 8, 16, 32, 64], 8, 3
SIZES = [(128, 128), (100, 120)]


def maps(side: int = 128) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, WIDTH, side // s, side // s) for s in STRIDES]


def target(*boxes: list[float]) -> Target:
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    masks = torch.zeros(len(corners), 128, 128, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, corners.long().tolist(), strict=True):
        mask[y1:y2, x1 : (x1 + x2) // 2] = True
    return Target(corners, torch.arange(len(corners)) % K, masks)


TWO = [target([10, 20, 50, 70], [60, 60, 120, 100]), target([30, 10, 70, 90])]
EMPTY = target()


def detector(name: str = "mask_rcnn", match: str | Match = "torchvision", heads: int = 1, **settings: Any) -> RCNN:
    torch.manual_seed(0)
    small = {"box_head": BoxHead(fcs=2, width=16), "mask_head": MaskHead(2, 8, heads=heads), "samples": 64}
    rules = MATCHES[match] if isinstance(match, str) else match
    return RCNN(WIDTH, STRIDES, K, Detector(name=name, **{**small, **settings}), rules)  # type: ignore[arg-type]


def torchvisions(ours: RCNN) -> RoIHeads:
    """torchvision's heads with the weights of ours; its background is class 0."""
    names = ["0", "1", "2", "3"]
    box = FastRCNNConvFCHead((WIDTH, 7, 7), [], [16, 16])
    predictor = FastRCNNPredictor(16, K + 1)
    mask, logits = MaskRCNNHeads(WIDTH, [8, 8], 1), MaskRCNNPredictor(8, 8, K + 1)
    theirs = RoIHeads(
        MultiScaleRoIAlign(names, 7, 2), box, predictor, 0.5, 0.5, 64, 0.25, None, 0.05, 0.5, 100,
        MultiScaleRoIAlign(names, 14, 2), mask, logits,
    )  # fmt: skip
    heads: Any = ours.stages[0].heads
    box.load_state_dict(heads.features.state_dict())
    masks: Any = ours.masks[0]
    mask.load_state_dict(masks.features.state_dict())
    with torch.no_grad():
        for name in ("weight", "bias"):
            scores, deltas = (getattr(layer, name) for layer in (heads.scores, heads.deltas))
            getattr(predictor.cls_score, name).copy_(torch.cat([scores[-1:], scores[:-1]]))
            getattr(predictor.bbox_pred, name).copy_(torch.cat([torch.zeros_like(deltas[:4]), deltas]))
            last = masks.masks
            getattr(logits.conv5_mask, name).copy_(getattr(last.conv5_mask, name))
            of_classes = getattr(last.mask_fcn_logits, name)
            getattr(logits.mask_fcn_logits, name).copy_(torch.cat([torch.zeros_like(of_classes[:1]), of_classes]))
    return theirs


def test_losses_equal_torchvisions_by_its_rules() -> None:
    ours, features = detector(), maps()
    theirs, boxes = torchvisions(ours), [torch.rand(40, 4).sort(dim=1)[0] * 100 for _ in range(2)]
    objects = [{"boxes": one.boxes, "labels": one.classes + 1, "masks": one.masks} for one in TWO]
    torch.manual_seed(3)
    losses = ours.losses(features, SIZES, list(boxes), TWO)
    torch.manual_seed(3)
    named = {str(i): one for i, one in enumerate(features)}
    _, expected = theirs(named, list(boxes), SIZES, objects)
    torch.testing.assert_close(list(losses.values()), list(expected.values()))


@torch.no_grad()
def test_detections_equal_torchvisions_by_its_rules() -> None:
    ours, features = detector().eval(), maps()
    theirs, boxes = torchvisions(ours).eval(), [torch.rand(40, 4).sort(dim=1)[0] * 100 + torch.tensor([0, 0, 9, 9])] * 2
    named = {str(i): one for i, one in enumerate(features)}
    expected, _ = theirs(named, list(boxes), SIZES)
    found = ours.detect(features, SIZES, list(boxes))
    for mine, one in zip(found, expected, strict=True):
        assert len(mine["scores"]) > 5
        torch.testing.assert_close(mine["boxes"], one["boxes"])
        torch.testing.assert_close(mine["scores"], one["scores"])
        assert torch.equal(mine["classes"], one["labels"] - 1)
        torch.testing.assert_close(mine["masks"], one["masks"][:, 0])


CASES = [("mask_rcnn", match, 1) for match in MATCHES]
CASES += [("cascade_mask_rcnn", match, heads) for match in MATCHES for heads in (1, 3)]


@pytest.mark.parametrize(("name", "match", "heads"), CASES)
def test_every_parameter_gets_a_gradient_with_and_without_objects(name: str, match: str, heads: int) -> None:
    agnostic = None if match != "mmdet" else False
    model = detector(name, match, heads, class_agnostic=agnostic)
    for targets in (TWO, [TWO[1], EMPTY], [EMPTY, EMPTY]):
        model.zero_grad()
        losses = model(maps(), SIZES, targets)
        torch.autograd.backward(list(losses.values()))
        assert all(loss.isfinite() for loss in losses.values())
        assert [name for name, one in model.named_parameters() if one.grad is None] == []


def test_one_set_of_deltas_or_one_for_each_class() -> None:
    shapes = {}
    for agnostic in (True, False):
        logits, deltas = detector(class_agnostic=agnostic)._stages()[0].heads(torch.zeros(5, WIDTH, 7, 7))
        shapes[agnostic] = (tuple(logits.shape), tuple(deltas.shape))
    assert shapes == {True: ((5, 4), (5, 1, 4)), False: ((5, 4), (5, 3, 4))}
    assert detector("cascade_mask_rcnn").settings.shares_deltas and not detector().settings.shares_deltas


def constant_cascade(match: str, scores: list[list[float]]) -> RCNN:
    """A cascade whose stages move no box and give these logits to each."""
    model = detector("cascade_rcnn", match).eval()
    for stage, bias in zip(model.stages, scores, strict=True):
        heads: Any = stage.heads
        for layer in (heads.scores, heads.deltas):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        heads.scores.bias.data = torch.tensor(bias)
    return model


@torch.no_grad()
def test_a_cascade_averages_probabilities_or_logits() -> None:
    logits = [[3.0, 0, 0, 0], [0.0, 0, 0, 3], [0.0, 0, 0, 0]]
    box = [torch.tensor([[10.0, 10, 50, 50]])] * 2
    by_hand = {
        "detectron2": torch.tensor(logits).softmax(1).mean(0)[0].item(),
        "mmdet": torch.tensor(logits).mean(0).softmax(0)[0].item(),
    }
    assert abs(by_hand["mmdet"] - by_hand["detectron2"]) > 0.01
    for match, expected in by_hand.items():
        found = constant_cascade(match, logits).detect(maps(), SIZES, box)[0]
        assert found["scores"].max().item() == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(found["boxes"][0], box[0][0])


@torch.no_grad()
def test_each_stage_starts_from_the_boxes_of_the_one_before() -> None:
    model = constant_cascade("detectron2", [[9.0, 0, 0, 0]] * 3)
    for stage in model._stages():
        stage.heads.deltas.bias.data = torch.tensor([1.0, 0, 0, 0])  # 1/10, 1/20 and 1/30 of the width
    found = model.detect(maps(), SIZES, [torch.tensor([[10.0, 10, 50, 50]])] * 2)[0]["boxes"][0]
    shift = 40 * (1 / 10 + 1 / 20 + 1 / 30)
    torch.testing.assert_close(found, torch.tensor([10 + shift, 10, 50 + shift, 50]))


def test_stages_are_weighted_and_share_the_gradient_as_the_rules_say() -> None:
    gradients = {}
    for match in ("detectron2", "mmdet"):
        rules = replace(MATCHES[match], resample=False)
        seen, losses = [], []
        for factor in (1.0, rules.features_gradient):
            model, features = detector("cascade_rcnn", replace(rules, features_gradient=factor)), maps()
            features[0].requires_grad_()
            torch.manual_seed(5)
            parts = model.losses(features, SIZES, [torch.tensor([[10.0, 20, 50, 70]])] * 2, TWO)
            torch.autograd.backward(list(parts.values()))
            assert features[0].grad is not None
            seen.append(features[0].grad)
            losses.append([parts[f"classes_{stage}"].item() for stage in (1, 2, 3)])
        assert losses[0] == losses[1]
        gradients[match] = (seen[1] / seen[0])[seen[0] != 0].mean().item()
    assert gradients == pytest.approx({"detectron2": 1 / 3, "mmdet": 1.0}, rel=1e-3)
    assert MATCHES["mmdet"].stage_weights == (1, 0.5, 0.25)


def test_mmdet_samples_each_stage_anew_and_detectron2_keeps_the_boxes() -> None:
    boxes = [torch.tensor([[10.0, 20, 50, 70], [80, 20, 100, 40]])] * 2
    added = {}
    for match in ("detectron2", "mmdet"):
        model = detector("cascade_rcnn", match)
        stage: Any = model.stages[1]
        samples = model._samples(stage, boxes, TWO, first=False)
        added[match] = [int(one.added.sum()) for one in samples]
    assert added == {"detectron2": [0, 0], "mmdet": [2, 1]}


@torch.no_grad()
def test_masks_of_several_heads_are_averaged() -> None:
    model = detector("cascade_mask_rcnn", heads=3).eval()
    for head, value in zip(cast(Any, model.masks), (-40.0, 0.0, 40.0), strict=True):
        last = head.masks.mask_fcn_logits
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, value)
    model.settings.score_threshold = 0.0
    found = model(maps(), SIZES)[0]
    assert found["masks"].shape[1:] == (28, 28)
    torch.testing.assert_close(found["masks"].unique(), torch.tensor([0.5]))


@torch.no_grad()
def test_a_detector_that_finds_nothing_gives_empty_tensors() -> None:
    model = detector("cascade_mask_rcnn", score_threshold=0.999).eval()
    for found in model(maps(), SIZES):
        assert {name: tuple(one.shape) for name, one in found.items()} == {
            "boxes": (0, 4), "scores": (0,), "classes": (0,), "masks": (0, 28, 28),
        }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mask_rcnn", "cascade_mask_rcnn"])
@torch.no_grad()
def test_boxes_at_1300_pixels_keep_their_place_under_autocast(name: str, dtype: torch.dtype) -> None:
    model = detector(name, "detectron2", class_agnostic=True, score_threshold=0.0).eval()
    for stage in model._stages():
        stage.heads.deltas.bias.data = torch.tensor([0.1, -0.2, 0.3, 0.1])
    features = [torch.randn(1, WIDTH, 64 // s, 1344 // s) for s in STRIDES]
    model.proposals._post_nms_top_n["testing"] = 10_000  # the order of scores may change, boxes may not
    boxes, _ = model.proposals(features, [(64, 1333)])
    right = boxes[0][boxes[0][:, 0] > 1290][:5].repeat(2, 1)
    found = {}
    for enabled in (False, True):
        with torch.autocast("cpu", dtype, enabled=enabled):
            _, deltas = model._heads(model._stages()[0], features, [right])
            found[enabled] = model.detect(features, [(64, 1333)], [right])[0]["boxes"]
            again, _ = model.proposals(features, [(64, 1333)])
        assert found[enabled].dtype == again[0].dtype == deltas.dtype == torch.float32
    places = [found[enabled][found[enabled][:, 0].argsort()] for enabled in (False, True)]
    n = min(map(len, places))
    assert n and (places[0][:n] - places[1][:n]).abs().max() < 0.01


def test_heads_begin_with_the_weights_of_the_rules() -> None:
    spread = {}
    for match in MATCHES:
        model = detector("mask_rcnn", match, box_head=BoxHead(width=256), mask_head=MaskHead(1, 64))
        heads, masks = model._stages()[0].heads, cast(Any, model.masks[0]).masks
        layers = (heads.scores, heads.deltas, masks.mask_fcn_logits)
        spread[match] = [layer.weight.std().item() for layer in layers]
        assert (heads.scores.bias == 0).all() == (match != "torchvision")
    assert spread["mmdet"] == pytest.approx([0.01, 0.001, (2 / 3) ** 0.5], rel=0.15)  # Kaiming, fan-out of 3 classes
    assert spread["detectron2"] == pytest.approx([0.01, 0.001, 0.001], rel=0.15)
    assert spread["torchvision"] == pytest.approx([1 / (3 * 256) ** 0.5] * 2 + [(2 / 3) ** 0.5], rel=0.15)
