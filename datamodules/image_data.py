"""Base of the image data modules: the arguments that all of them have, and how they prepare images."""

from typing import Any

from ssmpretrain.datamodules.decoding.augmentation import IMAGENET_MEAN, IMAGENET_STD, Augmentation
from ssmpretrain.datamodules.decoding.batcher import Batcher
from ssmpretrain.datamodules.decoding.decode import MAX_PIXELS
from ssmpretrain.datamodules.decoding.photometric import Photometric
from ssmpretrain.datamodules.splits.by_path import is_image_folder, open_split
from ssmpretrain.datamodules.splits.image_split import ImageSplit
from ssmpretrain.datamodules.splits.planned_data import PlannedData


class ImageData(PlannedData):
    """Arguments and behaviour shared by `ImageShards` and `ImageFolder`.

    The defaults are MAE's augmentation. Other runs add to it, in this order: crop, flip, auto_augment, color_jitter,
    photometric, normalisation, random_erasing. All of it is a function of seed, epoch, sample and copy alone.

    Args:
        batch_size: Samples per batch on one device; copies of an image count.
        num_workers: Processes that decode images on each rank; 0 decodes in the main process.
        image_size: Side of the square images in pixels, or (height, width).
        crop_scale: Area of the random training crop as a fraction of the image, (least, most) in (0, 1].
        horizontal_flip: Whether a training image is mirrored half of the time; not for digits or text.
        interpolation: "bicubic" or "bilinear", of the crops in training and evaluation and of auto_augment.
        auto_augment: timm's policy for training images, such as "rand-m9-mstd0.5-inc1", "original-mstd0.5", "3a" or
            "augmix-m5-w4-d2"; null for none. What comes into the image from outside has the colour `mean`.
        color_jitter: Strength with which brightness, contrast and saturation of a training image vary, at least 0. As
            in timm it does nothing beside auto_augment, unless that is a 3a policy: published recipes state both.
        photometric: Jitter with the hue, grayscale, blur and solarising of a training image, each with its probability,
            as contrastive and self-distilling methods state them; see `Photometric`. Null for none.
        random_erasing: Probability that a rectangle of a training image becomes normal noise, in [0, 1]: a fiftieth to
            a third of the area, after normalisation.
        repeats: Repeated augmentation: read one training image in `repeats` each epoch (in `repeats` epochs, each
            once), decode it once, and augment it this often for one batch, the last of a batch as often as fits. An
            epoch keeps its number of batches. DeiT's sampler gives the copies to different ranks; here they stay on
            one, half a batch or more from where mixup (sample i with sample B - 1 - i) would pair them.
        epoch_samples: Samples of an epoch, copies counted, whatever the size of the data; null for all of them. An
            epoch begins where the one before ended, and every sample is read once before any is read again.
        remainder: What becomes of training samples that do not fill an optimizer step on every rank: "drop" leaves
            them out, others each epoch; "repeat" fills the step with samples from the start of the epoch.
        eval_crop_ratio: Fraction of the side that the evaluation's centre crop keeps, in (0, 1]; images are resized to
            image_size / eval_crop_ratio before, at most 100,000,000 pixels.
        mean: Per channel, of images in [0, 1], subtracted.
        std: Per channel, of images in [0, 1], divided by; positive.
        seed: Decides order and augmentation, together with the epoch.
        max_bad_fraction: Fraction of the samples read that may be unusable, in [0, 1]; above it (and above 10
            samples, at the default) the run stops.
        max_pixels: An image whose header says that it has more is a bad sample and is not decoded.
        require_labels: Whether a sample without a label is a bad one; else its label is -1.

    Raises:
        DataError: If an argument is out of range.
    """

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int = 2,
        image_size: int | tuple[int, int] = 224,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        horizontal_flip: bool = True,
        interpolation: str = "bicubic",
        auto_augment: str | None = None,
        color_jitter: float = 0.0,
        photometric: Photometric | None = None,
        random_erasing: float = 0.0,
        repeats: int = 1,
        epoch_samples: int | None = None,
        remainder: str = "drop",
        eval_crop_ratio: float = 0.875,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        seed: int = 0,
        max_bad_fraction: float = 0.01,
        max_pixels: int = MAX_PIXELS,
        require_labels: bool = False,
    ) -> None:
        augmentation = Augmentation(
            self._where,
            image_size=image_size,
            crop_scale=crop_scale,
            horizontal_flip=horizontal_flip,
            interpolation=interpolation,
            auto_augment=auto_augment,
            color_jitter=color_jitter,
            photometric=photometric,
            random_erasing=random_erasing,
            eval_crop_ratio=eval_crop_ratio,
            mean=mean,
            std=std,
        )
        self._check(max_pixels > 0, "max_pixels is at least 1", max_pixels)
        common: dict[str, Any] = {"mean": mean, "std": std, "seed": seed}
        common |= {"max_pixels": max_pixels, "require_labels": require_labels}
        train, evaluation = augmentation.train_transform(), augmentation.eval_transform()
        super().__init__(
            train_batcher=self._batcher(transform=train, random_erasing=random_erasing, **common),
            eval_batcher=self._batcher(transform=evaluation, **common),
            batch_size=batch_size,
            num_workers=num_workers,
            repeats=repeats,
            epoch_samples=epoch_samples,
            remainder=remainder,
            seed=seed,
            max_bad_fraction=max_bad_fraction,
            require_labels=require_labels,
        )
        # The settings in one place, and each by its own name for what reports how a model was trained.
        self.augmentation = augmentation
        self.image_size = augmentation.size
        self.mean, self.std = mean, std
        self.interpolation, self.eval_crop_ratio = interpolation, eval_crop_ratio
        self.crop_scale, self.horizontal_flip, self.random_erasing = crop_scale, horizontal_flip, random_erasing
        self.auto_augment, self.color_jitter, self.photometric = auto_augment, color_jitter, photometric
        self.max_pixels = max_pixels

    def _batcher(self, **options: Any) -> Batcher:
        """Return what turns raw samples into batches, by the arguments of `Batcher`."""
        return Batcher(**options)

    def others(self, paths: str | list[str]) -> "ImageData":
        """Return a data module of other labelled images for validation, prepared and read as those of this one.

        Args:
            paths: An image folder with a sub-folder per class, or shards as `ImageShards` takes them.
        """
        names = ("batch_size", "num_workers", "image_size", "interpolation", "eval_crop_ratio", "mean", "std")
        options = {name: getattr(self, name) for name in (*names, "max_bad_fraction", "max_pixels")}
        return _OtherImages([paths] if isinstance(paths, str) else list(paths), **options)


class _OtherImages(ImageData):
    """Labelled images at a path, for validation.

    Args:
        paths: An image folder, or shards.
        **options: Arguments of `ImageData`.
    """

    def __init__(self, paths: list[str], **options: Any) -> None:
        self.val = paths
        self._kind = "ImageFolder" if is_image_folder(paths) else "ImageShards"
        super().__init__(**options)

    @property
    def _where(self) -> str:
        return self._kind

    def _open(self, split: str) -> ImageSplit:
        return open_split(self.val, f"{self._where}: {split}", max_bad_fraction=self.max_bad_fraction)
