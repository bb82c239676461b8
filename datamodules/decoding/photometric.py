"""Changes of a training image's colours: jitter, grayscale, blur and solarising, each with its probability."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torchvision.transforms import v2

from ssmpretrain.base.errors import DataError


@dataclass
class Photometric:
    """Random changes of the colours of a training image, in the order of the arguments; nothing by default.

    Args:
        brightness: Strength b of the brightness jitter, at least 0. The image is multiplied by a random factor from
            max(0, 1 - b) to 1 + b.
        contrast: Strength of the contrast jitter, at least 0. A factor as above scales the distance from the mean grey
            level.
        saturation: Strength of the saturation jitter, at least 0. A factor as above scales the distance from the gray
            image.
        hue: Strength h of the hue jitter, in [0, 0.5]. The hue turns by a random fraction of the circle from -h to h.
        jitter_probability: Probability that the four kinds of jitter are applied, in [0, 1]. Their order is random.
        grayscale_probability: Probability that the image becomes gray, in [0, 1].
        blur_probability: Probability of a Gaussian blur, in [0, 1].
        blur_sigma: Standard deviation of the blur in pixels of the crop, (least, most), above 0.
        solarize_probability: Probability that all values in the upper half of the range are inverted, in [0, 1].

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

    def transforms(self, image_size: tuple[int, int]) -> list[Callable[[Tensor], Tensor]]:
        """Return the steps that have a probability above 0; each maps (3, H, W) uint8 to the same shape.

        The steps draw from torch's global generator.

        Args:
            image_size: (H, W) of the crop.
        """
        steps: list[tuple[float, v2.Transform]] = []
        jitter = (self.brightness, self.contrast, self.saturation, self.hue)
        if any(jitter):
            steps.append((self.jitter_probability, v2.ColorJitter(*jitter)))
        steps.append((self.grayscale_probability, v2.Grayscale(num_output_channels=3)))
        reach = min(math.ceil(3 * self.blur_sigma[1]), min(image_size) - 1)  # the border is reflected
        steps.append((self.blur_probability, v2.GaussianBlur(2 * reach + 1, self.blur_sigma)))
        steps.append((self.solarize_probability, v2.RandomSolarize(threshold=128, p=1)))
        return [v2.RandomApply([step], p=chance) for chance, step in steps if chance > 0]


def _check(holds: bool, what: str, got: object) -> None:
    if not holds:
        raise DataError(f"Photometric: {what}; got {got}. Correct it in data.photometric.")
