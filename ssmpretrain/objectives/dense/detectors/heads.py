"""Heads of boxes and of masks, which read the features of a box.

n boxes, K classes
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from ssmpretrain.objectives.dense.detectors.exact_layers import ExactLinear, exact
from ssmpretrain.objectives.dense.detectors.match import Match
from ssmpretrain.objectives.dense.detectors.settings import BoxHead, MaskHead, Norm

BOX_SIDE, MASK_SIDE = 7, 14  # positions along a side of the features of a box


class Boxes(nn.Module):
    """Scores of K classes and the background, and deltas, from the features of a box.

    Args:
        width: Channels of the features.
        num_classes: K.
        class_agnostic: Whether one set of deltas serves all classes.
        settings: Settings of the layers.
        match: Rules that differ between published implementations: the initial weights.
    """

    def __init__(self, width: int, num_classes: int, class_agnostic: bool, settings: BoxHead, match: Match) -> None:
        super().__init__()
        convs, fcs = [settings.conv_width] * settings.convs, [settings.width] * settings.fcs
        self.features = FastRCNNConvFCHead((width, BOX_SIDE, BOX_SIDE), convs, fcs, _norm(settings.norm))
        self.scores = ExactLinear(settings.width, num_classes + 1)
        self.deltas = ExactLinear(settings.width, 4 * (1 if class_agnostic else num_classes))
        if match.published_init:
            _draw(self, match.published_init)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (n, K + 1), background last, and deltas (n, 1 or K, 4), float32, of features (n, C, 7, 7)."""
        vectors = self.features(features)
        return self.scores(vectors), self.deltas(vectors).unflatten(1, (-1, 4))


class Masks(nn.Module):
    """A mask of 28 x 28 pixels for each of K classes from the features of a box.

    Args:
        width: Channels of the features.
        num_classes: K.
        settings: Settings of the layers.
        match: Rules that differ between published implementations: the initial weights.
    """

    def __init__(self, width: int, num_classes: int, settings: MaskHead, match: Match) -> None:
        super().__init__()
        self.features = MaskRCNNHeads(width, [settings.width] * settings.convs, 1, _norm(settings.norm))
        self.masks = MaskRCNNPredictor(settings.width, settings.width, num_classes)
        if match.published_init:
            for layer in (self.masks.conv5_mask, self.masks.mask_fcn_logits):
                nn.init.zeros_(layer.bias)
        if match.published_init == "kaiming":
            nn.init.normal_(self.masks.mask_fcn_logits.weight, std=0.001)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (n, K, 28, 28), float32, of features (n, C, 14, 14)."""
        return exact(self.masks(self.features(features)))


def _norm(name: Norm) -> Callable[..., nn.Module] | None:
    return partial(LayerNorm2d, eps=1e-6) if name == "layer" else None


def _draw(head: Boxes, rule: str) -> None:
    for layer in head.features.modules():
        if isinstance(layer, nn.Linear):
            if rule == "xavier":
                nn.init.xavier_uniform_(layer.weight)
            else:
                nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
    for layer, std in ((head.scores, 0.01), (head.deltas, 0.001)):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
