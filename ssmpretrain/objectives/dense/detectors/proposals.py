"""Region proposals: anchors, their scores and deltas, and the best of them as boxes.

B images, A anchors of all maps
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers

from ssmpretrain.objectives.dense.detectors.box_losses import box_loss
from ssmpretrain.objectives.dense.detectors.exact_layers import ExactConv2d
from ssmpretrain.objectives.dense.detectors.match import Match
from ssmpretrain.objectives.dense.detectors.matching import IGNORED, ObjectMatcher
from ssmpretrain.objectives.dense.detectors.settings import Proposals
from ssmpretrain.objectives.dense.detectors.targets import Target


class Anchors(AnchorGenerator):  # type: ignore[misc]  # torchvision has no types
    """Anchors at every position of maps with given strides.

    Args:
        sizes: Sides in pixels of the square anchors of each map.
        ratios: Height by width.
        strides: Stride of each map in pixels.
        rounded: Whether corners are rounded to whole pixels.
    """

    def __init__(
        self, sizes: Sequence[Sequence[float]], ratios: Sequence[float], strides: Sequence[int], rounded: bool
    ) -> None:
        self.rounded = rounded
        super().__init__(tuple(tuple(size) for size in sizes), (tuple(ratios),) * len(strides))
        self.strides = list(strides)

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008  torchvision's signature
    ) -> Tensor:
        side = torch.as_tensor(scales, dtype=dtype, device=device)
        root = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt().unsqueeze(1)
        half_width, half_height = (side / root).flatten() / 2, (side * root).flatten() / 2
        corners = torch.stack([-half_width, -half_height, half_width, half_height], dim=1)
        return corners.round() if self.rounded else corners

    def on(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return the anchors of each map (B, C, h, w), in pixels, (h * w * anchors per position, 4), float32."""
        self.set_cell_anchors(torch.float32, maps[0].device)
        steps = [[torch.tensor(stride, device=maps[0].device)] * 2 for stride in self.strides]
        anchors: list[Tensor] = self.grid_anchors([list(one.shape[-2:]) for one in maps], steps)
        return anchors


class ProposalNetwork(RegionProposalNetwork):  # type: ignore[misc]
    """torchvision's region proposal network with explicit strides, the rules of `match`, and float32 boxes.

    Args:
        width: Channels of the maps.
        strides: Stride of each map in pixels.
        settings: Settings of anchors and proposals.
        match: Rules that differ between published implementations.

    Source: Ren et al., "Faster R-CNN" (arXiv:1506.01497).
    """

    def __init__(self, width: int, strides: Sequence[int], settings: Proposals, match: Match) -> None:
        sizes = [[settings.anchor_scale * stride] for stride in strides]
        anchors = Anchors(sizes, settings.anchor_ratios, strides, match.anchors_rounded)
        head = RPNHead(width, len(settings.anchor_ratios), settings.convs)
        head.cls_logits, head.bbox_pred = ExactConv2d.of(head.cls_logits), ExactConv2d.of(head.bbox_pred)
        in_training, in_test = settings.before_nms
        super().__init__(
            anchors,
            head,
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=settings.samples,
            positive_fraction=settings.positive_fraction,
            pre_nms_top_n={"training": in_training, "testing": in_test},
            post_nms_top_n={"training": match.proposals_kept, "testing": settings.after_nms},
            nms_thresh=settings.nms_iou,
        )
        self.proposal_matcher = ObjectMatcher(0.7, 0.3, True, match.low_quality_iou, match.low_quality_to_best)
        self.rules, self.quota = match, settings.samples

    def forward(
        self, maps: Sequence[Tensor], sizes: Sequence[tuple[int, int]], targets: Sequence[Target] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return the proposals of each image, best first, (n, 4), float32, and the losses if there are targets.

        Args:
            maps: Maps (B, C, h, w), float32, finest first.
            sizes: Height and width in pixels of each image without padding.
            targets: The objects of each image, or None.
        """
        scores, deltas = self.head(list(maps))
        per_map = [one[0].numel() for one in scores]
        scores, deltas = concat_box_prediction_layers(scores, deltas)  # (B * A, 1), (B * A, 4)
        anchors = torch.cat(self.anchor_generator.on(maps))
        boxes = self.box_coder.decode(deltas.detach(), [anchors] * len(sizes)).view(len(sizes), -1, 4)
        proposals, _ = self.filter_proposals(boxes, scores, list(sizes), per_map)
        if targets is None:
            return proposals, {}
        return proposals, self.losses(scores.view(len(sizes), -1), deltas.view(len(sizes), -1, 4), anchors, targets)

    def losses(self, scores: Tensor, deltas: Tensor, anchors: Tensor, targets: Sequence[Target]) -> dict[str, Tensor]:
        """Compute the losses of scores (B, A) and deltas (B, A, 4) of anchors (A, 4)."""
        objects = [self.proposal_matcher.match(anchors, target.boxes) for target in targets]
        labels = [(one >= 0).float().masked_fill(one == IGNORED, -1) for one in objects]
        positive, negative = (torch.stack(parts).bool() for parts in self.fg_bg_sampler(labels))
        sampled = positive | negative
        count = self.quota * len(targets) if self.rules.anchor_quota else max(1, int(sampled.sum()))
        of_boxes = [
            box_loss(
                self.rules.box_loss, deltas[i][mine], anchors[mine], target.boxes[objects[i][mine]], self.box_coder,
                self.rules.beta,
            )
            for i, (target, mine) in enumerate(zip(targets, positive, strict=True))
        ]  # fmt: skip
        of_scores = F.binary_cross_entropy_with_logits(scores[sampled], positive[sampled].to(scores), reduction="sum")
        return {"objectness": of_scores / count, "proposals": torch.stack(of_boxes).sum() / count}
