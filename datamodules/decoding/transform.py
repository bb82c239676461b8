"""Transform of a decoded image to one size: MAE's augmentation in training, a centre crop in evaluation."""

import math
from collections.abc import Callable, Sequence

from torch import Tensor
from torchvision.transforms import v2

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
        self.train: v2.Transform | None = None
        if crop_scale is not None:
            crop = v2.RandomResizedCrop(image_size, scale=crop_scale, interpolation=self.interpolation)
            mirror = [v2.RandomHorizontalFlip()] if flip else []
            self.train = v2.Compose([crop, *mirror, *further])

    def __call__(self, image: Tensor, *, seed: int) -> Tensor:
        """Transform (3, h, w) uint8 to (3, H, W) uint8; the seed decides all random choices."""
        if self.train is not None:
            seed_transforms(seed)
            augmented: Tensor = self.train(image)
            return augmented
        h, w = image.shape[-2:]
        return resized_centre_crop(image, self._resized(h, w), self.image_size, self.interpolation)

    def _resized(self, h: int, w: int) -> tuple[int, int]:
        """Return height and width before the centre crop, equal to those of timm and open_clip."""
        H, W = (math.floor(side / self.eval_crop_ratio) for side in self.image_size)
        if H == W:  # torchvision rounds the longer side down
            return (int(H * h / w), H) if w <= h else (H, int(H * w / h))
        scale = min(h / H, w / W)
        return round(h / scale), round(w / scale)
