"""Base class of the image data modules: their common arguments, and the preparation of images."""

import inspect
from typing import Any

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules.decoding.augmentation import IMAGENET_MEAN, IMAGENET_STD, Augmentation
from ssmpretrain.datamodules.decoding.batcher import Batcher
from ssmpretrain.datamodules.decoding.decode import MAX_PIXELS
from ssmpretrain.datamodules.decoding.photometric import Photometric
from ssmpretrain.datamodules.decoding.transform import ImageTransform
from ssmpretrain.datamodules.decoding.views import ViewGroup, ViewsTransform
from ssmpretrain.datamodules.splits.by_path import is_image_folder, open_split
from ssmpretrain.datamodules.splits.image_split import ImageSplit
from ssmpretrain.datamodules.splits.planned_data import PlannedData


class ImageData(PlannedData):
    """Base class of `ImageShards` and `ImageFolder`: their common arguments, and the preparation of images.

    The default augmentation is MAE's: crop and flip. Further steps can be added. Their order is crop, flip,
    auto_augment, color_jitter, photometric, normalisation, random_erasing. The result depends on the seed, the epoch,
    the sample and the number of its copy alone.

    Args:
        batch_size: Number of samples in a batch on one device; copies of an image count.
        num_workers: Number of processes that decode images on each rank; 0 decodes in the main process.
        image_size: Side of the square images in pixels, or (height, width).
        crop_scale: Area of the random training crop as a fraction of the image, (least, most) in (0, 1]. Beside
            `views`, each group has its own.
        horizontal_flip: Whether a training image is mirrored with probability 1/2. Do not use it for digits or text.
        interpolation: "bicubic" or "bilinear", for the crops in training and evaluation and for auto_augment.
        auto_augment: Policy of timm for training images, such as "rand-m9-mstd0.5-inc1", "original-mstd0.5", "3a" or
            "augmix-m5-w4-d2"; null for none. Areas from outside the image get the colour `mean`.
        color_jitter: Strength of the jitter of brightness, contrast and saturation of a training image, at least 0. As
            in timm, it has no effect beside auto_augment unless the policy is 3a; published recipes state both.
        photometric: Colour jitter with hue, grayscale, blur and solarising of a training image, each with a
            probability, as in recipes of contrastive and self-distilling methods; see `Photometric`. Null for none.
        views: Several views of each training image instead of one, for objectives that compare views, such as DINO and
            LeJEPA: groups of views, global ones first; see `ViewGroup`. An image is decoded once for all its views, and
            each view depends on the seed, the epoch, the sample, the number of its copy and the number of the view
            alone. Groups have their own crop_scale and photometric; setting these, auto_augment, color_jitter or
            random_erasing beside views is an error. Null for one view.
        random_erasing: Probability that a rectangle of a training image becomes normal noise after normalisation, in
            [0, 1]. The rectangle covers between a fiftieth and a third of the area.
        repeats: Repeated augmentation: number of augmented copies of an image in its batch; the last image of a batch
            may have fewer. An image is decoded once for all its copies. An epoch keeps its number of batches, so it
            reads one image in `repeats`, and `repeats` epochs read each image once. All copies stay on one rank,
            whereas DeiT's sampler spreads them over ranks. Mixup does not mix copies of an image.
        epoch_samples: Number of samples in an epoch, copies counted; null for the size of the data. Each epoch begins
            where the epoch before ended, and every sample is read once before any sample is read again.
        remainder: Treatment of training samples that do not fill an optimizer step on every rank. "drop" leaves them
            out, different ones in each epoch; "repeat" fills the step with samples from the start of the epoch.
        eval_crop_ratio: Fraction of the side that the centre crop of an evaluation keeps, in (0, 1]. Images are first
            resized to image_size / eval_crop_ratio, which is at most 100,000,000 pixels.
        mean: Mean of each channel, for images in [0, 1]; it is subtracted.
        std: Standard deviation of each channel, for images in [0, 1], positive; the difference is divided by it.
        seed: Decides order and augmentation, together with the epoch.
        max_bad_fraction: Fraction of the samples read that may be unusable, in [0, 1]. If more are unusable, the run
            stops. At least 1000 samples are assumed, so the default tolerates 10 unusable samples in any run.
        max_pixels: Largest number of pixels of an image. A larger image is not decoded and counts as a bad sample.
        require_labels: Whether a sample without a label counts as bad; otherwise its label is -1.

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
        views: list[ViewGroup] | None = None,
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
        train: ImageTransform | ViewsTransform
        if views is None:
            train = augmentation.train_transform()
        else:
            self._check_crop_scale(crop_scale)
            train = ViewsTransform(views, augmentation, self._where)
        evaluation = augmentation.eval_transform()
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
        # Each setting is also an attribute, for code that reports how a model was trained.
        self.augmentation = augmentation
        self.image_size = augmentation.size
        self.mean, self.std = mean, std
        self.interpolation, self.eval_crop_ratio = interpolation, eval_crop_ratio
        self.crop_scale, self.horizontal_flip, self.random_erasing = crop_scale, horizontal_flip, random_erasing
        self.auto_augment, self.color_jitter, self.photometric = auto_augment, color_jitter, photometric
        self.views = views
        self.max_pixels = max_pixels

    def _check_crop_scale(self, crop_scale: tuple[float, float]) -> None:
        """Raise if the crop of a single view is set, which several views do not use."""
        makers = (vars(cls)["__init__"] for cls in type(self).__mro__ if "__init__" in vars(cls))
        parameters = (inspect.signature(maker).parameters for maker in makers)
        default = next(given["crop_scale"].default for given in parameters if "crop_scale" in given)
        if tuple(crop_scale) != tuple(default):
            raise DataError(
                f"{self._where}: beside views, each group has its own crop_scale; got crop_scale {list(crop_scale)}. "
                "Leave it out, and set crop_scale of the groups."
            )

    def _batcher(self, **options: Any) -> Batcher:
        """Return the object that turns raw samples into batches; subclasses may return another kind of `Batcher`."""
        return Batcher(**options)

    def others(self, paths: str | list[str]) -> "ImageData":
        """Return a data module with other labelled images for validation, with the settings of this data module.

        Args:
            paths: An image folder with one sub-folder per class, or shards as in `ImageShards`.
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
