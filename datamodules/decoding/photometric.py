"""Changes of a training image's colours: jitter, grayscale, blur and solarising, each with its probability."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules.decoding import colours


@dataclass
class Photometric:
    """Random changes of the colours of a training image, in the order of the arguments; nothing by default.

    The changes are those of torchvision on tensors. Most published recipes ran on images of Pillow. There the hue has
    256 steps, and the blur is a sum of boxes with the same standard deviation, up to 16 levels off (0.3 to 0.6 on
    average), which repeats the pixels at the border instead of reflecting the image.

    Args:
        brightness: Strength b of the brightness jitter, at least 0. The image is multiplied by a random factor from
            max(0, 1 - b) to 1 + b.
        contrast: Strength of the contrast jitter, at least 0. A factor as above scales the distance from the mean gray
            level.
        saturation: Strength of the saturation jitter, at least 0. A factor as above scales the distance from the gray
            image.
        hue: Strength h of the hue jitter, in [0, 0.5]. The hue turns by a random fraction of the circle from -h to h.
        jitter_probability: Probability that the four kinds of jitter are applied, in [0, 1]. Their order is random.
        grayscale_probability: Probability that the image becomes gray, in [0, 1].
        blur_probability: Probability of a Gaussian blur, in [0, 1].
        blur_sigma: Standard deviation of the blur in pixels of the crop, (least, most), above 0.
        solarize_probability: Probability that all values from 128 to 255 are inverted, in [0, 1].

    Raises:
        DataError: If an argument is out of range.

    Source: Chen et al., "SimCLR" (arXiv:2002.05709), appendix A; Grill et al., "BYOL" (arXiv:2006.07733), appendix B.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    jitter_probability: float = 1.0
    grayscale_probability: float = 0.0
    blur_probability: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_probability: float = 0.0

    def __post_init__(self) -> None:
        self.blur_sigma = (float(self.blur_sigma[0]), float(self.blur_sigma[1]))  # a recipe gives a list
        for name in ("brightness", "contrast", "saturation"):
            _check(0 <= getattr(self, name) < math.inf, f"{name} is a number of at least 0", getattr(self, name))
        _check(0 <= self.hue <= 0.5, "hue is in [0, 0.5]", self.hue)
        for name in ("jitter", "grayscale", "blur", "solarize"):
            chance = getattr(self, f"{name}_probability")
            _check(0 <= chance <= 1, f"{name}_probability is in [0, 1]", chance)
        least, most = self.blur_sigma
        _check(0 < least <= most < math.inf, "blur_sigma is (least, most) with 0 < least <= most", [least, most])

    def __call__(self, image: Tensor) -> Tensor:
        """Return a changed image for an image, (3, H, W), uint8. Random numbers come from torch's global generator.

        They are drawn as by `RandomApply` of torchvision.transforms.v2 with `ColorJitter`, `Grayscale`, `GaussianBlur`
        and `RandomSolarize`, so the same seed gives the same image, up to the rounding that `colours` states. The
        classes themselves would take half a millisecond for ten views, beside the time of their functions.
        """
        jitter = (self.brightness, self.contrast, self.saturation, self.hue)
        if any(jitter) and _happens(self.jitter_probability):
            image = self._jittered(image)
        if _happens(self.grayscale_probability):
            image = F.rgb_to_grayscale(image, num_output_channels=3)
        if _happens(self.blur_probability):
            image = colours.blur(image, _uniform(*self.blur_sigma))
        if _happens(self.solarize_probability):
            image = F.solarize(image, threshold=128)
        return image

    def _jittered(self, image: Tensor) -> Tensor:
        """Apply the four kinds of jitter in random order."""
        order = torch.randperm(4).tolist()
        strengths = (self.brightness, self.contrast, self.saturation)
        factors = [_uniform(max(0.0, 1 - strength), 1 + strength) if strength > 0 else None for strength in strengths]
        factors.append(_uniform(-self.hue, self.hue) if self.hue > 0 else None)
        for kind in order:
            if (factor := factors[kind]) is not None:
                image = _JITTER[kind](image, factor)
        return image


_JITTER = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, colours.turn_hue)


def _happens(probability: float) -> bool:
    """Draw whether a step of this probability is applied; nothing is drawn for a step that never is."""
    return probability > 0 and torch.rand(1).item() < probability


def _uniform(least: float, most: float) -> float:
    return torch.empty(1).uniform_(least, most).item()


def _check(holds: bool, what: str, got: object) -> None:
    if not holds:
        raise DataError(f"Photometric: {what}; got {got}. Correct it in data.photometric or data.views.")
