"""The differences between R-CNN detectors of torchvision, mmdet and detectron2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ssmpretrain.base.errors import UserError

Coder = tuple[float, float, float, float]  # factors on the deltas x, y, width, height


@dataclass(frozen=True)
class Match:
    """Everything in which our R-CNN detectors follow torchvision 0.26, mmdet 3.3 or detectron2 0.6.

    | field | torchvision | mmdet | detectron2 |
    | --- | --- | --- | --- |
    | box_loss | smooth L1, beta 1/9 | L1 | L1 |
    | coder_weights | 10 10 5 5 | 10 10 5 5 | 10 10 5 5 |
    | ... of stage 2 and 3 | as detectron2 | 20 20 10 10; 30.3 30.3 14.9 14.9 | 20 20 10 10; 30 30 15 15 |
    | aligned | no | yes | yes |
    | samples_per_bin | 2 | adaptive | adaptive |
    | mask_threshold | soft targets | 0.5 | 0.5 |
    | proposals_kept | 2000 | 1000 | 1000 |
    | low_quality_iou | above 0 | at least 0.3 | above 0 |
    | low_quality_to_best | yes | no | yes |
    | low_quality_boxes | no | Mask R-CNN only | no |
    | anchors_rounded | yes | no | no |
    | anchor_quota | no | no | yes |
    | published_init | none | Xavier | Kaiming |
    | stage_weights | as detectron2 | 1, 0.5, 0.25 | 1, 1, 1 |
    | features_gradient | as detectron2 | 1 | 1/3 |
    | resample | as detectron2 | yes | no |
    | average | as detectron2 | logits | probabilities |

    torchvision has no cascade: "as detectron2" says what our cascade does with torchvision's other rules.

    The same in all three, and here: deltas of the proposals have weights 1 1 1 1; an anchor is positive from IoU 0.7
    and negative below 0.3; a box of a single stage is positive from IoU 0.5; objects that are a crowd are dropped, and
    train as background; losses of boxes are sums over positive samples, divided by the number of samples; the loss of
    masks is the mean over the pixels of positive samples; sizes are cut at exp(log(1000 / 16)).

    Different, and not behind this switch: images without objects, which mmdet and detectron2 leave out of the training
    data (here they train as background; leave them out in the data module); initial weights of mmdet's pyramid
    (Xavier; here torchvision's Kaiming, as in detectron2); torchvision itself makes every anchor without overlap
    positive if an object overlaps no anchor (here such an object takes no anchor).

    Args:
        name: Name of the code that is followed.
        box_loss: Loss of the deltas, of proposals and of boxes: "smooth_l1" with `beta`, or "l1".
        beta: Difference at which the smooth L1 loss turns from a square into a line.
        coder_weights: Factors on the deltas of boxes, for each of three stages; one stage uses the first.
        aligned: Whether RoIAlign shifts boxes by half a position, so that positions are the centres of their cells.
        samples_per_bin: Samples of RoIAlign along a side of each bin. 0 takes as many as the bin has positions.
        mask_threshold: Value from which a cropped and resized mask counts as the object. None takes the value itself.
        proposals_kept: Proposals of an image after suppression, in training.
        low_quality_iou: An object takes the anchor that overlaps it most, also below 0.7, if their IoU is above 0 and
            at least this.
        low_quality_to_best: Whether such an anchor goes to the object that it overlaps most itself. Otherwise it goes
            to the object that took it.
        low_quality_boxes: Whether the boxes of Mask R-CNN follow the same rule, with 0.5 for 0.3 and 0.7.
        anchors_rounded: Whether the corners of anchors are rounded to whole pixels.
        anchor_quota: Whether losses of proposals are divided by the number of anchors to sample, also if an image has
            fewer.
        published_init: Initial weights of the heads. "xavier" (mmdet) or "kaiming" with fan-in (detectron2) is that of
            fully connected layers; scores are normal with 0.01, deltas with 0.001, and biases 0; the last layer of
            detectron2's masks is normal with 0.001. None begins as torchvision's heads do.
        stage_weights: Factors on the losses of each stage of a cascade, masks included.
        features_gradient: Factor on the gradient that each stage of a cascade gives to the maps.
        resample: Whether each stage of a cascade samples its boxes anew, objects included. Otherwise all boxes of the
            first stage go through all stages.
        average: What a cascade averages over its stages before boxes are selected.

    Source: torchvision.models.detection; mmdet's configs/_base_/models/{mask,cascade-mask}-rcnn_r50_fpn.py and
        models/roi_heads/cascade_roi_head.py; detectron2's modeling/roi_heads/cascade_rcnn.py and configs of ViTDet.
    """

    name: str
    box_loss: Literal["smooth_l1", "l1"]
    aligned: bool
    samples_per_bin: int
    mask_threshold: float | None
    proposals_kept: int
    anchors_rounded: bool
    published_init: Literal["xavier", "kaiming", None]
    beta: float = 1 / 9
    coder_weights: tuple[Coder, Coder, Coder] = ((10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15))
    low_quality_iou: float = 0.0
    low_quality_to_best: bool = True
    low_quality_boxes: bool = False
    anchor_quota: bool = False
    stage_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    features_gradient: float = 1 / 3
    resample: bool = False
    average: Literal["probabilities", "logits"] = "probabilities"

    @classmethod
    def of(cls, name: str) -> Match:
        """Return the rules of "torchvision", "mmdet" or "detectron2"."""
        if name not in MATCHES:
            raise UserError(f"Detection: model.match is one of {', '.join(MATCHES)}; got {name!r}. Choose one of them.")
        return MATCHES[name]


_TORCHVISION = Match(
    name="torchvision",
    box_loss="smooth_l1",
    aligned=False,
    samples_per_bin=2,
    mask_threshold=None,
    proposals_kept=2000,
    anchors_rounded=True,
    published_init=None,
)
_MMDET = Match(
    name="mmdet",
    box_loss="l1",
    coder_weights=((10, 10, 5, 5), (20, 20, 10, 10), (1 / 0.033, 1 / 0.033, 1 / 0.067, 1 / 0.067)),
    aligned=True,
    samples_per_bin=0,
    mask_threshold=0.5,
    proposals_kept=1000,
    low_quality_iou=0.3,
    low_quality_to_best=False,
    low_quality_boxes=True,
    anchors_rounded=False,
    published_init="xavier",
    stage_weights=(1.0, 0.5, 0.25),
    features_gradient=1.0,
    resample=True,
    average="logits",
)
_DETECTRON2 = Match(
    name="detectron2",
    box_loss="l1",
    aligned=True,
    samples_per_bin=0,
    mask_threshold=0.5,
    proposals_kept=1000,
    anchors_rounded=False,
    anchor_quota=True,
    published_init="kaiming",
)
MATCHES: dict[str, Match] = {rules.name: rules for rules in (_TORCHVISION, _MMDET, _DETECTRON2)}
