"""Augmentation of an image together with its class map, and their resizing in evaluation."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ssmpretrain.base.errors import DataError
from ssmpretrain.base.seeds import random_generator
from ssmpretrain.datamodules.targets.batches import IGNORED
from ssmpretrain.datamodules.targets.distortion import Distortion
from ssmpretrain.datamodules.targets.resizing import check_fitted_size, fitted_size, resize_image, resize_map


@dataclass
class SegmentationAugmentation:
    """Random changes of a training image and its class map: resize, crop, flip, colours.

    Images are resized bilinearly, class maps to the nearest pixel. What is smaller than the crop is padded at the right
    and below: the image with 0 after normalisation, the class map with 255.

    Args:
        resize: Length of the short side, and largest length of the long side, before `scale`, in pixels; null for
            `eval_size` of the data module. The aspect stays.
        scale: Range of the random factor of `resize`, (least, most), positive.
        category_ratio: A crop is drawn again if one class covers at least this fraction of its labelled pixels, or no
            pixel is labelled. In (0, 1]; 1 also draws crops of a single class again.
        redraws: Largest number of further draws of a crop, at least 0; the last one is taken. 0 accepts any crop.
        horizontal_flip: Whether image and class map are mirrored with probability 1/2.
        distortion: Changes of the colours; null for none.

    Raises:
        DataError: If an argument is out of range.

    Source: the training pipeline of mmseg for ADE20K, which all published recipes of this package use.
    """

    resize: tuple[int, int] | None = None
    scale: tuple[float, float] = (0.5, 2.0)
    category_ratio: float = 0.75
    redraws: int = 10
    horizontal_flip: bool = True
    distortion: Distortion | None = field(default_factory=Distortion)

    def __post_init__(self) -> None:
        if self.resize is not None:
            self.resize = check_fitted_size(self.resize, "resize", type(self).__name__)
        least, most = self.scale
        _check(0 < least <= most <= 100, "scale is (least, most) with 0 < least <= most <= 100", list(self.scale))
        self.scale = (float(least), float(most))
        _check(0 < self.category_ratio <= 1, "category_ratio is in (0, 1]", self.category_ratio)
        _check(isinstance(self.redraws, int) and 0 <= self.redraws <= 1000, "redraws is from 0 to 1000", self.redraws)


class TrainSegmentation:
    """Augment an image with its class map. The result depends on the seed alone.

    Args:
        settings: The augmentation.
        crop: Largest height and width of the result.
        resize: (short, longest) before the random factor.
        antialias: Whether images are smoothed before they are made smaller.
    """

    def __init__(
        self, settings: SegmentationAugmentation, crop: tuple[int, int], resize: tuple[int, int], antialias: bool
    ) -> None:
        self.settings, self.crop = settings, crop
        self.resize, self.antialias = settings.resize or resize, antialias

    def __call__(self, image: Tensor, mask: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Augment (3, h, w) uint8 and (h, w) uint8; return them with at most the height and width of the crop."""
        rng = random_generator("segmentation", seed)
        factor = float(rng.uniform(*self.settings.scale))
        short, longest = (max(1, int(side * factor)) for side in self.resize)
        size = fitted_size((mask.shape[0], mask.shape[1]), short, longest)
        mask = resize_map(mask, size)
        rows, columns = self._crop(mask, rng)
        image = resize_image(image, size, antialias=self.antialias)[:, rows, columns]
        mask = mask[rows, columns]
        if self.settings.horizontal_flip and rng.random() < 0.5:
            image, mask = image.flip(-1), mask.flip(-1)
        if self.settings.distortion is not None:
            image = self.settings.distortion(image, rng)
        return image, mask

    def _crop(self, mask: Tensor, rng: np.random.Generator) -> tuple[slice, slice]:
        """Draw a crop; draw again as long as one class covers too much of it."""
        rows, columns = self._draw(mask, rng)
        for _ in range(self.settings.redraws):
            if self._is_mixed(mask[rows, columns]):
                break
            rows, columns = self._draw(mask, rng)
        return rows, columns

    def _draw(self, mask: Tensor, rng: np.random.Generator) -> tuple[slice, slice]:
        rows, columns = (
            slice(start := int(rng.integers(max(0, side - crop) + 1)), start + crop)
            for side, crop in zip(mask.shape, self.crop, strict=True)
        )
        return rows, columns

    def _is_mixed(self, mask: Tensor) -> bool:
        counts = torch.bincount(mask.flatten(), minlength=IGNORED + 1)[:IGNORED]
        labelled = int(counts.sum())
        return labelled > 0 and int(counts.max()) < self.settings.category_ratio * labelled


class EvalSegmentation:
    """Resize an image with its class map for evaluation, without a crop.

    Args:
        resize: (short, longest) side of the result in pixels.
        antialias: Whether images are smoothed before they are made smaller.
    """

    def __init__(self, resize: tuple[int, int], antialias: bool) -> None:
        self.resize, self.antialias = resize, antialias

    def __call__(self, image: Tensor, mask: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Resize (3, h, w) uint8 and (h, w) uint8; the seed changes nothing."""
        size = fitted_size((mask.shape[0], mask.shape[1]), *self.resize)
        return resize_image(image, size, antialias=self.antialias), resize_map(mask, size)


def _check(holds: bool, what: str, got: object) -> None:
    if not holds:
        raise DataError(f"SegmentationAugmentation: {what}; got {got}. Correct it in data.augmentation.")
