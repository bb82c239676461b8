"""Augmentation of an image together with its objects, and their resizing in evaluation."""

import math
from abc import ABCMeta, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from ssmpretrain.base.errors import DataError
from ssmpretrain.base.seeds import random_generator
from ssmpretrain.datamodules.targets.batches import Annotation, Objects
from ssmpretrain.datamodules.targets.framing import Frame
from ssmpretrain.datamodules.targets.resizing import fitted_size

_MOST = 10_000  # pixels of a side


@dataclass
class DetectionAugmentation(metaclass=ABCMeta):
    """Base class of random changes of a training image and its objects. A subclass is one published recipe.

    Boxes and masks follow the image. After a crop, boxes are those of the pixels that are left of the masks. Objects
    without a pixel are left out, and crowds pass along.

    Args:
        horizontal_flip: Whether an image is mirrored with probability 1/2.
    """

    horizontal_flip: bool = True

    @abstractmethod
    def batch_size(self, image_size: tuple[int, int] | None, where: str) -> tuple[int, int] | None:
        """Return height and width of training batches; None if they follow the images of each batch.

        Args:
            image_size: Setting of the data module, or None.
            where: Name of the data module, which opens every message.

        Raises:
            DataError: If the setting has no effect.
        """

    @abstractmethod
    def eval_size(self, image_size: tuple[int, int] | None) -> tuple[int, int]:
        """Return the default (short, longest) sides of evaluation images."""

    @abstractmethod
    def change(self, frame: Frame, size: tuple[int, int] | None, rng: np.random.Generator) -> None:
        """Resize and crop a frame, which is flipped already, to at most `size`, the result of `batch_size`."""


@dataclass
class LargeScaleJitter(DetectionAugmentation):
    """Large-scale jitter: resize by a random factor, and cut or pad to `image_size` of the data module.

    The image is resized so that it fits into `image_size` times the factor. What is larger than `image_size` is cut at
    a random place; what is smaller is padded at the right and below, with 0 after normalisation.

    Args:
        scale: Range of the factor, (least, most), positive.

    Raises:
        DataError: If an argument is out of range.

    Source: Ghiasi et al., "Simple Copy-Paste" (arXiv:2012.07177), section 3; ViTDet's and Vim's detection use it with
        1024 pixels.
    """

    scale: tuple[float, float] = (0.1, 2.0)

    def __post_init__(self) -> None:
        least, most = self.scale
        holds = 0 < least <= most <= 100
        _check(self, holds, "scale is (least, most) with 0 < least <= most <= 100", list(self.scale))
        self.scale = (float(least), float(most))

    def batch_size(self, image_size: tuple[int, int] | None, where: str) -> tuple[int, int]:
        """Return `image_size`; 1024 pixels by default."""
        return image_size or (1024, 1024)

    def eval_size(self, image_size: tuple[int, int] | None) -> tuple[int, int]:
        """Return the longer side of `image_size` for both: the long side has this length, as in ViTDet."""
        side = max(image_size or (1024, 1024))
        return side, side

    def change(self, frame: Frame, size: tuple[int, int] | None, rng: np.random.Generator) -> None:
        """Resize by a random factor, and cut what is larger than `size`."""
        assert size is not None
        factor = float(rng.uniform(*self.scale))
        ratio = min(factor * new / old for new, old in zip(size, frame.size, strict=True))
        h, w = (max(1, math.floor(side * ratio + 0.5)) for side in frame.size)
        frame.resize((h, w))
        _crop(frame, min(h, size[0]), min(w, size[1]), rng)


@dataclass
class MultiScaleResize(DetectionAugmentation):
    """Resize to a random length of the short side, with a random crop before it if wanted.

    The defaults are the 1x recipe of mmdet. Its 3x recipe has the short sides 480, 512, ..., 800 and crop_probability
    0.5. Batches have the size of their largest image, so `image_size` of the data module stays null.

    Args:
        short_sides: Lengths of the short side in pixels, one of which is drawn for each image.
        longest: Largest length of the long side in pixels. An image that would pass it becomes smaller.
        crop_probability: Chance that an image is first resized to one of `crop_short_sides` and cut, in [0, 1].
        crop_short_sides: Lengths of the short side before the cut, one of which is drawn.
        crop_sides: Smallest and largest length of each side of the cut in pixels; the sides are drawn one by one.

    Raises:
        DataError: If an argument is out of range.

    Source: the training pipelines of mmdet's Swin recipes, which VMamba's use; the crop comes from DETR (Carion et al.,
        arXiv:2005.12872).
    """

    short_sides: list[int] = field(default_factory=lambda: [800])
    longest: int = 1333
    crop_probability: float = 0.0
    crop_short_sides: list[int] = field(default_factory=lambda: [400, 500, 600])
    crop_sides: tuple[int, int] = (384, 600)

    def __post_init__(self) -> None:
        for name in ("short_sides", "crop_short_sides"):
            sides = getattr(self, name)
            _check(self, bool(sides) and all(map(_is_side, sides)), f"{name} are from 1 to {_MOST:,} pixels", sides)
        holds = _is_side(self.longest) and self.longest >= max(self.short_sides)
        _check(self, holds, f"longest is at least the largest of short_sides, and up to {_MOST:,}", self.longest)
        _check(self, 0 <= self.crop_probability <= 1, "crop_probability is in [0, 1]", self.crop_probability)
        least, most = self.crop_sides
        holds = _is_side(least) and _is_side(most) and least <= most
        _check(self, holds, "crop_sides is (least, most) with 1 <= least <= most", list(self.crop_sides))
        self.crop_sides = (least, most)

    def batch_size(self, image_size: tuple[int, int] | None, where: str) -> None:
        """Return None: a batch has the size of its largest image."""
        if image_size is not None:
            raise DataError(
                f"{where}: image_size is of LargeScaleJitter; with MultiScaleResize, batches have the size of their "
                f"largest image; got {image_size[0]} x {image_size[1]}. Leave out image_size, and set short_sides and "
                "longest of the augmentation."
            )

    def eval_size(self, image_size: tuple[int, int] | None) -> tuple[int, int]:
        """Return the largest short side, and `longest`."""
        return max(self.short_sides), self.longest

    def change(self, frame: Frame, size: tuple[int, int] | None, rng: np.random.Generator) -> None:
        """Cut with the chance `crop_probability`, and resize."""
        if rng.random() < self.crop_probability:
            frame.resize(fitted_size(frame.size, _one_of(self.crop_short_sides, rng), math.inf))
            least, most = self.crop_sides
            h, w = (int(rng.integers(min(side, least), min(side, most) + 1)) for side in frame.size)
            _crop(frame, h, w, rng)
        frame.resize(fitted_size(frame.size, _one_of(self.short_sides, rng), self.longest))


class TrainDetection:
    """Augment an image with its objects. The result depends on the seed alone.

    Args:
        augmentation: The random changes.
        size: Height and width of the batch; None if it follows the images.
        antialias: Whether images are smoothed before they are made smaller.
        masks: Whether objects keep their masks.
    """

    def __init__(
        self, augmentation: DetectionAugmentation, size: tuple[int, int] | None, antialias: bool, masks: bool
    ) -> None:
        self.augmentation, self.size, self.antialias, self.masks = augmentation, size, antialias, masks

    def __call__(self, image: Tensor, annotation: Annotation, seed: int) -> tuple[Tensor, Objects]:
        """Augment an image (3, h, w) uint8 with its annotation; return both at the size of the training image."""
        rng = random_generator("detection", seed)
        frame = Frame(image, annotation, self.antialias)
        if self.augmentation.horizontal_flip and rng.random() < 0.5:
            frame.flip()
        self.augmentation.change(frame, self.size, rng)
        return frame.image, frame.objects(masks=self.masks)


class EvalDetection:
    """Resize an image with its boxes for evaluation. Masks stay in the annotation, at the size of the file.

    Args:
        resize: (short, longest) side of the result in pixels.
        antialias: Whether images are smoothed before they are made smaller.
    """

    def __init__(self, resize: tuple[int, int], antialias: bool) -> None:
        self.resize, self.antialias = resize, antialias

    def __call__(self, image: Tensor, annotation: Annotation, seed: int) -> tuple[Tensor, Objects]:
        """Resize an image (3, h, w) uint8 with its boxes; the seed changes nothing."""
        frame = Frame(image, annotation, self.antialias)
        frame.resize(fitted_size(frame.size, *self.resize))
        return frame.image, frame.objects(masks=False)


def _crop(frame: Frame, h: int, w: int, rng: np.random.Generator) -> None:
    """Cut a window of h x w pixels at a random place."""
    top, left = (int(rng.integers(side - new + 1)) for side, new in zip(frame.size, (h, w), strict=True))
    frame.crop(top, left, h, w)


def _one_of(sides: Sequence[int], rng: np.random.Generator) -> int:
    return int(sides[int(rng.integers(len(sides)))])


def _is_side(side: object) -> bool:
    return isinstance(side, int) and not isinstance(side, bool) and 1 <= side <= _MOST


def _check(settings: DetectionAugmentation, holds: bool, what: str, got: object) -> None:
    if not holds:
        raise DataError(f"{type(settings).__name__}: {what}; got {got}. Correct it in data.augmentation.")
