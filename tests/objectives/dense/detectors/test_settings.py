"""Settings of detectors: defaults by name, ranges, and the way through a checkpoint."""

from dataclasses import asdict
from typing import Any

import pytest

from ssmpretrain.objectives.dense.detectors.building import build_detector
from ssmpretrain.objectives.dense.detectors.match import MATCHES, Match
from ssmpretrain.objectives.dense.detectors.settings import BoxHead, Detector, MaskHead, Neck, Proposals


def test_thresholds_and_sharing_of_deltas_follow_the_name() -> None:
    rows = {name: Detector(name=name) for name in ("mask_rcnn", "cascade_mask_rcnn", "fcos")}
    assert [(one.least_score, one.most_overlap, one.shares_deltas) for one in rows.values()] == [
        (0.05, 0.5, False), (0.05, 0.5, True), (0.2, 0.6, False),
    ]  # fmt: skip


def test_settings_come_back_from_plain_data() -> None:
    settings = Detector("cascade_mask_rcnn", mask_head=MaskHead(heads=3), proposals=Proposals(before_nms=(7, 5)))
    assert Detector(**asdict(settings)) == settings
    lists = {**asdict(settings.proposals), "before_nms": [7, 5], "anchor_ratios": [0.5, 1, 2]}
    assert Proposals(**lists) == settings.proposals


def wrong(value: str) -> Any:
    return value


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Detector(name=wrong("yolo")), "Detection: model.detector.name is one of mask_rcnn, cascade.*got yolo"),
        (lambda: Detector(mask_head=MaskHead(heads=3)), "mask_head.heads is 1 for mask_rcnn; got 3"),
        (lambda: Detector("cascade_mask_rcnn", mask_head=MaskHead(heads=2)), "heads is 1 or 3 for cascade.*got 2"),
        (lambda: Detector(score_threshold=1.0), r"score_threshold is in \[0, 1\); got 1.0"),
        (lambda: Detector(nms_iou=0.0), "nms_iou is in"),
        (lambda: Detector(box_loss=wrong("l2")), "box_loss is one of"),
        (lambda: Detector(positive_fraction=1.5), "positive_fraction"),
        (lambda: Detector(max_detections=0), "max_detections is at least 1; got 0"),
        (lambda: Detector(samples=0), "samples is at least 1"),
        (lambda: Proposals(anchor_ratios=()), "anchor_ratios are one or more"),
        (lambda: Proposals(anchor_scale=0), "anchor_scale is above 0"),
        (lambda: Proposals(before_nms=(10, 0)), r"before_nms are at least 1; got \[10, 0\]"),
        (lambda: BoxHead(fcs=0), "box_head.fcs is at least 1"),
        (lambda: MaskHead(norm=wrong("batch")), "mask_head.norm is none or layer; got batch"),
        (
            lambda: Neck(name=wrong("bifpn")),
            "model.neck.name is one of auto, fpn, simple_pyramid; got bifpn",
        ),
        (lambda: Neck(width=0), "neck.width is at least 1"),
        (lambda: Match.of("mmcv"), "model.match is one of torchvision, mmdet, detectron2; got 'mmcv'"),
        (
            lambda: build_detector(Detector("retinanet"), MATCHES["mmdet"], 3, 32, [8, 16]),
            "retinanet is torchvision's; got model.match mmdet. Set it to torchvision",
        ),
    ],
)
def test_a_setting_out_of_range_is_named_with_its_place(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_the_three_rules_differ_in_what_their_table_says_and_in_nothing_else() -> None:
    rows = {name: asdict(rules) for name, rules in MATCHES.items()}
    differ = {name for name in rows["mmdet"] if len({str(row[name]) for row in rows.values()}) > 1}
    assert differ == {
        "name", "box_loss", "coder_weights", "aligned", "samples_per_bin", "mask_threshold", "proposals_kept",
        "low_quality_iou", "low_quality_to_best", "low_quality_boxes", "anchors_rounded", "anchor_quota",
        "published_init", "stage_weights", "features_gradient", "resample", "average",
    }  # fmt: skip
    table = Match.__doc__ or ""
    assert all(f"| {name} |" in table for name in differ - {"name", "coder_weights"})
