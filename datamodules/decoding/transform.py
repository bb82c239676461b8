"""Transform of a decoded image to one size: MAE's augmentation in training, a centre crop in evaluation."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ssmpretrain.base.seeds import seed_transforms
from ssmpretrain.datamodules.decoding.centre_crop import resized_centre_crop


class ImageTransform:
    """Transform a decoded image to one size, by MAE's augmentation in training and a centre crop in evaluation.

    Args:
        image_size: (H, W) of the result.
        crop_scale: Area of the random crop as a fraction of the image, (least, most); None for evaluation.
        flip: Whether a training image is mirrored with probability 1/2.
        eval_crop_ratio: Fraction of the side of the resized image that the centre crop keeps, in (0, 1].
        interpolation: "bicubic" or "bilinear", for both crops.
        further: Transforms of a training image after crop and flip; each maps (3, H, W) uint8 to the same shape.

    Attributes:
        augments: Whether this is the transform of training images.

    Source: He et al., "Masked Autoencoders Are Scalable Vision Learners" (arXiv:2111.06377), table 8.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        crop_scale: tuple[float, float] | None,
        flip: bool,
        eval_crop_ratio: float,
        interpolation: str = "bicubic",
        further: Sequence[Callable[[Tensor], Tensor]] = (),
    ) -> None:
        self.image_size = image_size
        self.eval_crop_ratio = eval_crop_ratio
        self.interpolation = v2.InterpolationMode(interpolation)
        self.augments = crop_scale is not None
        self._crop = v2.RandomResizedCrop(image_size, scale=crop_scale or (1.0, 1.0))
        self._flip, self._further = flip, further

    def __call__(self, image: Tensor, *, seed: int) -> Tensor:
        """Transform (3, h, w) uint8 to (3, H, W) uint8; the seed decides all random choices."""
        if self.augments:
            seed_transforms(seed)
            return self.augmented(image)
        h, w = image.shape[-2:]
        return resized_centre_crop(image, self._resized(h, w), self.image_size, self.interpolation)

    def augmented(self, image: Tensor) -> Tensor:
        """Augment (3, h, w) uint8 to (3, H, W) uint8. Random numbers come from the global generators.

        The draws are those of torchvision's `RandomResizedCrop` and `RandomHorizontalFlip`. The functions are called
        directly, because the classes take half of the time of a crop of 96 pixels.
        """
        window = self._crop.make_params([image])
        options: dict[str, Any] = {"interpolation": self.interpolation, "antialias": True}
        image = F.resized_crop(image, **window, size=list(self.image_size), **options)
        if self._flip and torch.rand(1).item() < 0.5:
            image = F.horizontal_flip(image)
        for change in self._further:
            image = change(image)
        return image

    def _resized(self, h: int, w: int) -> tuple[int, int]:
        """Return height and width before the centre crop, equal to those of timm and open_clip."""
        H, W = (math.floor(side / self.eval_crop_ratio) for side in self.image_size)
        if H == W:  # torchvision rounds the longer side down
            return (int(H * h / w), H) if w <= h else (H, int(H * w / h))
        scale = min(h / H, w / W)
        return round(h / scale), round(w / scale)
