"""Augmentation settings in one object: crop, colours, erasing and normalisation."""

import math
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass

from torch import Tensor
from torchvision.transforms import v2

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules.decoding.decode import MAX_PIXELS
from ssmpretrain.datamodules.decoding.photometric import Photometric
from ssmpretrain.datamodules.decoding.policy import PolicyAugment, check_policy
from ssmpretrain.datamodules.decoding.transform import ImageTransform

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INTERPOLATIONS = ("bicubic", "bilinear")


@dataclass
class Augmentation:
    """Settings that resize images, augment them in training and normalise them.

    The arguments have the names and the meaning of the arguments of `ImageData`, which documents them and gives the
    defaults.

    Args:
        where: Name of the data module, which opens every message.

    Raises:
        DataError: If a setting is out of range, or `color_jitter` and `photometric` both set the jitter.
    """

    where: InitVar[str]
    image_size: int | tuple[int, int]
    crop_scale: tuple[float, float]
    horizontal_flip: bool
    interpolation: str
    auto_augment: str | None
    color_jitter: float
    photometric: Photometric | None
    random_erasing: float
    eval_crop_ratio: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self, where: str) -> None:
        def check(holds: bool, what: str, got: object) -> None:
            if not holds:
                raise DataError(f"{where}: {what}; got {got}.")

        self.size = check_image_size(self.image_size, where)
        check(_is_range(self.crop_scale), "crop_scale is (least, most) with 0 < least <= most <= 1", self.crop_scale)
        known = self.interpolation in INTERPOLATIONS
        check(known, f"interpolation is {' or '.join(INTERPOLATIONS)}", self.interpolation)
        check_policy(self.auto_augment, where)
        check(0 <= self.color_jitter < math.inf, "color_jitter is finite and at least 0", self.color_jitter)
        once = self.color_jitter == 0 or self.photometric is None
        check(once, "color_jitter and photometric both set the jitter; one of them is left out", self.color_jitter)
        check(0 <= self.random_erasing <= 1, "random_erasing is a probability in [0, 1]", self.random_erasing)
        check_crop_ratio(self.eval_crop_ratio, self.size, where)
        check_normalisation(self.mean, self.std, where)

    def train_transform(self) -> ImageTransform:
        """Return the transform of a training image before normalisation: crop, flip, then the changes of colour."""
        return ImageTransform(
            self.size, self.crop_scale, self.horizontal_flip, self.eval_crop_ratio, self.interpolation, self.colours()
        )

    def view_transform(
        self, size: tuple[int, int], crop_scale: tuple[float, float], flip: bool, photometric: Photometric | None
    ) -> ImageTransform:
        """Return the transform of one of several views of a training image; `ViewGroup` describes the arguments."""
        further = [] if photometric is None else photometric.transforms(size)
        return ImageTransform(size, crop_scale, flip, self.eval_crop_ratio, self.interpolation, further)

    def eval_transform(self) -> ImageTransform:
        """Return the transform of an image in evaluation: a centre crop."""
        return ImageTransform(self.size, None, False, self.eval_crop_ratio, self.interpolation)

    def colours(self) -> list[Callable[[Tensor], Tensor]]:
        """Return the transforms that follow crop and flip, in order; each maps (3, H, W) uint8 to the same shape.

        The policy and the jitter come first, then `photometric`. As in timm, a policy replaces the jitter unless it is
        3a.
        """
        steps: list[Callable[[Tensor], Tensor]] = []
        if self.auto_augment is not None:
            steps.append(PolicyAugment(self.auto_augment, self.size, self.mean, self.interpolation))
        if self.color_jitter > 0 and (self.auto_augment is None or "3a" in self.auto_augment):
            steps.append(v2.ColorJitter(self.color_jitter, self.color_jitter, self.color_jitter))
        if self.photometric is not None:
            steps.extend(self.photometric.transforms(self.size))
        return steps


def check_image_size(image_size: int | Sequence[int], where: str) -> tuple[int, int]:
    """Return (height, width) of an image size, which is one number for a square or a pair.

    Args:
        image_size: Side of a square, or (height, width), in pixels.
        where: Name of the data module, which opens every message.

    Raises:
        DataError: If the size is not one or two positive integers, or has more than `MAX_PIXELS` pixels.
    """
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise DataError(
            f"{where}: image_size is a positive number of pixels, or height and width; got {image_size}. Use 224, say."
        )
    if sides[0] * sides[1] > MAX_PIXELS:
        raise DataError(
            f"{where}: image_size has at most {MAX_PIXELS:,} pixels; got {sides[0]:,} x {sides[1]:,}. Use 224, say."
        )
    return sides[0], sides[1]


def check_normalisation(mean: Sequence[float], std: Sequence[float], where: str) -> None:
    """Check mean and standard deviation of the channels, for images in [0, 1].

    Raises:
        DataError: If they are not three finite numbers each, or a standard deviation is not positive.
    """
    if len(mean) != 3 or not all(map(math.isfinite, mean)):
        raise DataError(f"{where}: mean has three finite numbers, of the channels in [0, 1]; got {mean}.")
    if len(std) != 3 or not all(0 < value < math.inf for value in std):
        raise DataError(f"{where}: std has three positive, finite numbers, of the channels in [0, 1]; got {std}.")


def check_crop_ratio(ratio: float, image_size: Sequence[int], where: str) -> None:
    """Check the fraction of the side that the centre crop of an evaluation keeps.

    Raises:
        DataError: If the fraction is not in (0, 1], or images would be resized to more than `MAX_PIXELS` pixels.
    """
    if not 0 < ratio <= 1:
        raise DataError(f"{where}: eval_crop_ratio is in (0, 1]; got {ratio}. Use 0.875, say.")
    if math.prod(side / ratio for side in image_size) > MAX_PIXELS:
        raise DataError(
            f"{where}: images are resized to image_size / eval_crop_ratio before the crop, at most {MAX_PIXELS:,} "
            f"pixels; got {ratio} for {image_size[0]:,} x {image_size[1]:,}. Use 0.875, say."
        )


def _is_range(scale: Sequence[float]) -> bool:
    return len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1
