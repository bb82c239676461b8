"""Settings of detectors, as they stand in a recipe under `model.detector` and `model.neck`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

from ssmpretrain.base.errors import UserError

Name = Literal["mask_rcnn", "cascade_mask_rcnn", "faster_rcnn", "cascade_rcnn", "retinanet", "fcos"]
NeckName = Literal["auto", "fpn", "simple_pyramid"]
Norm = Literal["none", "layer"]
BoxLoss = Literal["match", "l1", "smooth_l1", "giou"]


_ONLY_WITH_PROPOSALS = [
    "class_agnostic", "box_loss", "box_loss_weight", "samples", "positive_fraction", "proposals", "box_head",
]  # fmt: skip


class Kind(NamedTuple):
    """The properties of a detector that follow from its name: stages of box heads (0 for none), and whether masks."""

    stages: int
    masks: bool
    score_threshold: float
    nms_iou: float


KINDS: dict[str, Kind] = {
    "mask_rcnn": Kind(1, True, 0.05, 0.5),
    "cascade_mask_rcnn": Kind(3, True, 0.05, 0.5),
    "faster_rcnn": Kind(1, False, 0.05, 0.5),
    "cascade_rcnn": Kind(3, False, 0.05, 0.5),
    "retinanet": Kind(0, False, 0.05, 0.5),
    "fcos": Kind(0, False, 0.2, 0.6),
}


@dataclass
class Neck:
    """Settings of the pyramid between encoder and detector.

    Args:
        name: "fpn": top-down pyramid on the four maps of an encoder with stages. "simple_pyramid": four maps from the
            last map of an encoder with one stride, as in ViTDet. "auto" takes the one that fits the encoder.
        width: Channels of every map, at least 1; for "fcos" a multiple of 32, at least 64.

    Source: Lin et al., "Feature Pyramid Networks" (arXiv:1612.03144); Li et al., "ViTDet" (arXiv:2203.16527).
    """

    name: NeckName = "auto"
    width: int = 256

    def __post_init__(self) -> None:
        _check(self.name in get_args(NeckName), f"neck.name is one of {', '.join(get_args(NeckName))}", self.name)
        _check(self.width >= 1, "neck.width is at least 1", self.width)


@dataclass
class Proposals:
    """Settings of the anchors and the proposals of R-CNN detectors. `Match` sets how many proposals train.

    Args:
        convs: Convolutions before the scores, at least 1. ViTDet has 2.
        anchor_scale: Side of the square anchor of a map, in strides, above 0; 8 gives 32 pixels at stride 4.
        anchor_ratios: Height by width of the anchors, each above 0.
        samples: Anchors of an image that train, at least 1.
        positive_fraction: Largest share of positive anchors among them, in (0, 1).
        before_nms: Best proposals of each map that enter suppression, in training and in test, at least 1.
        after_nms: Best proposals of an image that remain in test, at least 1.
        nms_iou: IoU above which a proposal is suppressed by a better one of the same map, in (0, 1).
    """

    convs: int = 1
    anchor_scale: float = 8.0
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    samples: int = 256
    positive_fraction: float = 0.5
    before_nms: tuple[int, int] = (2000, 1000)
    after_nms: int = 1000
    nms_iou: float = 0.7

    def __post_init__(self) -> None:
        self.anchor_ratios = tuple(float(ratio) for ratio in self.anchor_ratios)  # a checkpoint gives a list
        self.before_nms = (int(self.before_nms[0]), int(self.before_nms[1]))
        where = "detector.proposals"
        for name in ("convs", "samples", "after_nms"):
            _check(getattr(self, name) >= 1, f"{where}.{name} is at least 1", getattr(self, name))
        _check(min(self.before_nms) >= 1, f"{where}.before_nms are at least 1", list(self.before_nms))
        _check(self.anchor_scale > 0, f"{where}.anchor_scale is above 0", self.anchor_scale)
        ratios = list(self.anchor_ratios)
        _check(bool(ratios) and min(ratios) > 0, f"{where}.anchor_ratios are one or more numbers above 0", ratios)
        for name in ("positive_fraction", "nms_iou"):
            _check(0 < getattr(self, name) < 1, f"{where}.{name} lies between 0 and 1", getattr(self, name))


@dataclass
class BoxHead:
    """Settings of the head that classifies a box and moves its sides, in each stage.

    Args:
        convs: 3 x 3 convolutions, at least 0. ViTDet has 4, Mask R-CNN none.
        conv_width: Channels of the convolutions, at least 1.
        fcs: Fully connected layers after them, at least 1. ViTDet has 1, Mask R-CNN 2.
        width: Width of these layers, at least 1.
        norm: "layer" puts a LayerNorm over the channels after each convolution, as in ViTDet.
    """

    convs: int = 0
    conv_width: int = 256
    fcs: int = 2
    width: int = 1024
    norm: Norm = "none"

    def __post_init__(self) -> None:
        _check(self.convs >= 0, "detector.box_head.convs is at least 0", self.convs)
        for name in ("conv_width", "fcs", "width"):
            _check(getattr(self, name) >= 1, f"detector.box_head.{name} is at least 1", getattr(self, name))
        _check(self.norm in get_args(Norm), "detector.box_head.norm is none or layer", self.norm)


@dataclass
class MaskHead:
    """Settings of the head that gives a mask of 28 x 28 pixels for each class.

    Args:
        convs: 3 x 3 convolutions before the transposed one, at least 1.
        width: Channels of all of them, at least 1.
        norm: "layer" puts a LayerNorm over the channels after each convolution, as in ViTDet.
        heads: Number of heads, 1 or 3. A single head trains on the boxes of the first stage. "cascade_mask_rcnn" may
            also have 3, one for each of its three stages, whose probabilities are averaged.
    """

    convs: int = 4
    width: int = 256
    norm: Norm = "none"
    heads: int = 1

    def __post_init__(self) -> None:
        for name in ("convs", "width"):
            _check(getattr(self, name) >= 1, f"detector.mask_head.{name} is at least 1", getattr(self, name))
        _check(self.norm in get_args(Norm), "detector.mask_head.norm is none or layer", self.norm)


@dataclass
class Detector:
    """Settings of the detector.

    Args:
        name: Name of the detector. The names with "mask" give boxes and masks; "faster_rcnn" and "cascade_rcnn" are the
            same without masks. "retinanet" and "fcos" give boxes without proposals; they are torchvision's, on maps
            with strides 8 to 128, and use only `score_threshold`, `nms_iou` and `max_detections` of the settings below.
        class_agnostic: Whether one set of deltas serves all classes. None is true for a cascade, false otherwise.
        box_loss: Loss of boxes: that of `match`, "l1", "smooth_l1" (beta 1/9), or "giou" on the decoded boxes. The
            loss of proposals stays that of `match`.
        box_loss_weight: Factor on this loss, above 0. Swin's cascades have "giou" with 10.
        samples: Boxes of an image that train each stage, at least 1.
        positive_fraction: Largest share of positive boxes among them, in (0, 1).
        score_threshold: Score above which a detection counts, in [0, 1). None takes 0.05, and 0.2 for "fcos".
        nms_iou: IoU above which a detection is suppressed by a better one of its class, in (0, 1). None takes 0.5, and
            0.6 for "fcos".
        max_detections: Best detections of an image that remain, at least 1. COCO's AP counts 100.
        proposals: Settings of anchors and proposals.
        box_head: Settings of the box heads.
        mask_head: Settings of the mask heads.

    Source: He et al., "Mask R-CNN" (arXiv:1703.06870); Cai & Vasconcelos, "Cascade R-CNN" (arXiv:1906.09756), IoU 0.5,
        0.6, 0.7; Lin et al., "Focal Loss" (arXiv:1708.02002); Tian et al., "FCOS" (arXiv:1904.01355).
    """

    name: Name = "mask_rcnn"
    class_agnostic: bool | None = None
    box_loss: BoxLoss = "match"
    box_loss_weight: float = 1.0
    samples: int = 512
    positive_fraction: float = 0.25
    score_threshold: float | None = None
    nms_iou: float | None = None
    max_detections: int = 100
    proposals: Proposals = field(default_factory=Proposals)
    box_head: BoxHead = field(default_factory=BoxHead)
    mask_head: MaskHead = field(default_factory=MaskHead)

    def __post_init__(self) -> None:
        for name, part in (("proposals", Proposals), ("box_head", BoxHead), ("mask_head", MaskHead)):
            if isinstance(value := getattr(self, name), dict):  # from a checkpoint
                setattr(self, name, part(**value))
        _check(self.name in KINDS, f"detector.name is one of {', '.join(KINDS)}", self.name)
        _check(self.box_loss in get_args(BoxLoss), f"detector.box_loss is one of {get_args(BoxLoss)}", self.box_loss)
        _check(self.box_loss_weight > 0, "detector.box_loss_weight is above 0", self.box_loss_weight)
        for name in ("samples", "max_detections"):
            _check(getattr(self, name) >= 1, f"detector.{name} is at least 1", getattr(self, name))
        _check(0 < self.positive_fraction < 1, "detector.positive_fraction is in (0, 1)", self.positive_fraction)
        _check(0 <= self.least_score < 1, "detector.score_threshold is in [0, 1)", self.score_threshold)
        _check(0 < self.most_overlap < 1, "detector.nms_iou is in (0, 1)", self.nms_iou)
        allowed = {1, self.kind.stages} if self.kind.stages else {1}
        _check(
            self.mask_head.heads in allowed,
            f"detector.mask_head.heads is {' or '.join(map(str, sorted(allowed)))} for {self.name}",
            self.mask_head.heads,
        )

    @property
    def kind(self) -> Kind:
        """Return the properties that follow from the detector's name."""
        return KINDS[self.name]

    @property
    def unused(self) -> list[str]:
        """Return the names of settings that were changed, although this detector does not use them."""
        of_masks = [] if self.kind.masks else ["mask_head"]
        of_boxes = [] if self.kind.stages else _ONLY_WITH_PROPOSALS
        default = Detector(self.name)
        return [name for name in (*of_boxes, *of_masks) if getattr(self, name) != getattr(default, name)]

    # None stays in the fields, so that a recipe may change the name alone.

    @property
    def shares_deltas(self) -> bool:
        """Return whether one set of deltas serves all classes."""
        return self.kind.stages > 1 if self.class_agnostic is None else self.class_agnostic

    @property
    def least_score(self) -> float:
        """Return the score above which a detection counts."""
        return self.kind.score_threshold if self.score_threshold is None else self.score_threshold

    @property
    def most_overlap(self) -> float:
        """Return the IoU above which a detection is suppressed by a better one of its class."""
        return self.kind.nms_iou if self.nms_iou is None else self.nms_iou


def _check(holds: bool, what: str, got: object) -> None:
    if not holds:
        raise UserError(f"Detection: model.{what}; got {got}. Correct it.")
