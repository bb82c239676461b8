"""Photometric distortion of a training image: brightness, contrast, saturation and hue."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from ssmpretrain.base.errors import DataError


@dataclass
class Distortion:
    """Random changes of the colours of a training image, each with its own chance.

    The order is brightness, contrast, saturation, hue; half of the time contrast comes last. Values are cut to 0 to 255
    after each change. A strength of 0, or a range (1, 1), leaves a change out.

    Args:
        brightness: Largest number that is added to all values, or subtracted, 0 to 255.
        contrast: Range of the factor of all values, (least, most), positive.
        saturation: Range of the factor of the saturation in HSV, (least, most), positive.
        hue: Largest turn of the hue in degrees, 0 to 180. The published rule adds up to 18 to the hue of OpenCV, which
            counts steps of 2 degrees.
        probability: Chance of each change, in [0, 1].

    Raises:
        DataError: If an argument is out of range.

    Source: mmseg's `PhotoMetricDistortion`, which goes back to SSD (Liu et al., arXiv:1512.02325).
    """

    brightness: float = 32.0
    contrast: tuple[float, float] = (0.5, 1.5)
    saturation: tuple[float, float] = (0.5, 1.5)
    hue: float = 36.0
    probability: float = 0.5

    def __post_init__(self) -> None:
        self.contrast, self.saturation = _pair("contrast", self.contrast), _pair("saturation", self.saturation)
        _check(0 <= self.brightness <= 255, "brightness is from 0 to 255", self.brightness)
        _check(0 <= self.hue <= 180, "hue is in degrees, from 0 to 180", self.hue)
        _check(0 <= self.probability <= 1, "probability is in [0, 1]", self.probability)

    def __call__(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        """Change the colours of an image (3, H, W) uint8; return the same shape and dtype."""
        changed = image.float()
        contrast_first = rng.random() < 0.5
        if self._happens(rng):
            changed = (changed + float(rng.uniform(-self.brightness, self.brightness))).clamp_(0, 255)
        if contrast_first:
            changed = self._contrast(changed, rng)
        if self._happens(rng):
            changed = _saturated(changed, float(rng.uniform(*self.saturation)))
        if self._happens(rng):
            turn = float(rng.uniform(-self.hue, self.hue)) / 360
            changed = F.adjust_hue(changed / 255, turn) * 255
        if not contrast_first:
            changed = self._contrast(changed, rng)
        return changed.round_().clamp_(0, 255).to(torch.uint8)

    def _happens(self, rng: np.random.Generator) -> bool:
        return bool(rng.random() < self.probability)

    def _contrast(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        if not self._happens(rng):
            return image
        return (image * float(rng.uniform(*self.contrast))).clamp_(0, 255)


def _saturated(image: Tensor, factor: float) -> Tensor:
    """Multiply the saturation in HSV, at most to 1, with hue and value unchanged.

    A channel of value V, saturation S and hue is V (1 - S k), where k depends on the hue alone. So the distance of each
    channel from V = max(R, G, B) is multiplied, by at most 1 / S.
    """
    value, least = image.amax(0), image.amin(0)
    most = value / (value - least).clamp_(min=1e-6)  # 1 / S; grey does not change, whatever it is
    return value - (value - image) * most.clamp_(max=factor)


def _pair(name: str, limits: tuple[float, float]) -> tuple[float, float]:
    holds = len(limits) == 2 and 0 < limits[0] <= limits[1] < float("inf")
    _check(holds, f"{name} is (least, most) with 0 < least <= most", list(limits))
    return float(limits[0]), float(limits[1])


def _check(holds: bool, what: str, got: object) -> None:
    if not holds:
        raise DataError(f"Distortion: {what}; got {got}. Correct it in data.augmentation.distortion.")
