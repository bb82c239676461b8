"""RetinaNet and FCOS: torchvision's losses and detections, without its resizing, on explicit strides."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.image_list import ImageList

from ssmpretrain.objectives.dense.detectors.one_stage import OneStage
from ssmpretrain.objectives.dense.detectors.settings import Detector
from ssmpretrain.objectives.dense.detectors.targets import Target

STRIDES, WIDTH, K = [8, 16, 32, 64, 128], 64, 3
SIZES = [(128, 128), (100, 120)]
TARGETS = [
    Target(torch.tensor([[10.0, 20, 50, 70], [60, 60, 120, 100]]), torch.tensor([0, 2])),
    Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)),
]


def maps() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, WIDTH, 128 // s, 128 // s) for s in STRIDES]


def detector(name: str, **settings: Any) -> OneStage:
    torch.manual_seed(0)
    return OneStage(WIDTH, STRIDES, K, Detector(name=name, **settings))  # type: ignore[arg-type]


def torchvisions(ours: OneStage, name: str) -> Any:
    kind = RetinaNet if name == "retinanet" else FCOS
    theirs: Any = kind(SimpleNamespace(out_channels=WIDTH), K, score_thresh=0.005)
    theirs.load_state_dict(ours.model.state_dict())
    return theirs


@pytest.mark.parametrize("name", ["retinanet", "fcos"])
def test_losses_equal_torchvisions(name: str) -> None:
    ours, features = detector(name), maps()
    theirs = torchvisions(ours, name)
    losses: Any = ours(features, SIZES, TARGETS)
    anchors = theirs.anchor_generator(ImageList(torch.zeros(2, 3, 128, 128), SIZES), features)
    objects = [{"boxes": one.boxes, "labels": one.classes} for one in TARGETS]
    counts = [[one.shape[2] * one.shape[3] for one in features]] if name == "fcos" else []
    expected = theirs.compute_loss(objects, theirs.head(features), anchors, *counts)
    torch.testing.assert_close(list(losses.values()), list(expected.values()))


@pytest.mark.parametrize("name", ["retinanet", "fcos"])
@torch.no_grad()
def test_detections_equal_torchvisions_but_for_boxes_without_a_side(name: str) -> None:
    ours, features = detector(name, score_threshold=0.005).eval(), maps()
    theirs = torchvisions(ours, name).eval()
    counts = [one.shape[2] * one.shape[3] * (9 if name == "retinanet" else 1) for one in features]
    outputs = {key: list(one.split(counts, 1)) for key, one in theirs.head(features).items()}
    anchors = theirs.anchor_generator(ImageList(torch.zeros(2, 3, 128, 128), SIZES), features)
    expected = theirs.postprocess_detections(outputs, [list(one.split(counts)) for one in anchors], SIZES)
    found: Any = ours(features, SIZES)
    for mine, one in zip(found, expected, strict=True):
        keep = (one["boxes"][:, 2:] > one["boxes"][:, :2]).all(1)
        count = min(int(keep.sum()), len(mine["boxes"]))
        assert count > 10
        torch.testing.assert_close(mine["boxes"][:count], one["boxes"][keep][:count])


@pytest.mark.parametrize("name", ["retinanet", "fcos"])
def test_every_parameter_gets_a_gradient_without_objects(name: str) -> None:
    model = detector(name)
    losses: Any = model(maps(), SIZES, [TARGETS[1]] * 2)
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(loss.isfinite() for loss in losses.values()) and losses["boxes"] == 0


def test_an_object_that_overlaps_no_anchor_of_retinanet_takes_none() -> None:
    far = Target(torch.tensor([[9000.0, 9000, 9010, 9010]]), torch.tensor([0]))
    losses: Any = detector("retinanet")(maps(), SIZES, [far, far])
    assert losses["boxes"] == 0


@pytest.mark.parametrize("name", ["retinanet", "fcos"])
def test_predictions_are_float32_under_autocast(name: str) -> None:
    model = detector(name)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model.model.head(maps())
    assert {key: one.dtype for key, one in outputs.items()} == dict.fromkeys(outputs, torch.float32)


@pytest.mark.parametrize(("width", "recommended"), [(8, 64), (32, 64), (48, 64), (100, 96)])
def test_the_groups_of_fcos_have_two_channels_or_more(width: int, recommended: int) -> None:
    message = rf"model.neck.width is a multiple of 32 and at least 64; got {width}. Set it to {recommended}, say."
    with pytest.raises(ValueError, match=message):
        OneStage(width, STRIDES, K, Detector(name="fcos"))


@pytest.mark.parametrize("name", ["retinanet", "fcos"])
def test_one_image_may_have_maps_of_a_single_position(name: str) -> None:
    single = [torch.randn(1, WIDTH, max(64 // s, 1), max(64 // s, 1)) for s in STRIDES]
    losses: Any = detector(name)(single, [(64, 64)], TARGETS[:1])
    assert all(loss.isfinite() for loss in losses.values())
    assert len(detector(name).eval()(single, [(64, 64)])) == 1
