"""Base class of the data modules with objects: their common arguments, and the preparation of images."""

from typing import Any

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules.decoding.augmentation import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    check_image_size,
    check_normalisation,
)
from ssmpretrain.datamodules.decoding.decode import MAX_PIXELS
from ssmpretrain.datamodules.dense.dense_data import DenseData
from ssmpretrain.datamodules.faults.dropped_objects import DroppedObject, DroppedObjects, count_causes
from ssmpretrain.datamodules.labels.classes import CLASSES_FILE, Classes
from ssmpretrain.datamodules.targets.detection import DetectionBatcher
from ssmpretrain.datamodules.targets.detection_transforms import (
    DetectionAugmentation,
    EvalDetection,
    MultiScaleResize,
    TrainDetection,
)
from ssmpretrain.datamodules.targets.resizing import check_fitted_size


class DetectionData(DenseData):
    """Base class of `DetectionShards` and `CocoDetection`: common arguments and the preparation of images.

    Training images are mirrored, resized and cut together with their objects; see `MultiScaleResize` and
    `LargeScaleJitter`. The result depends on the seed, the epoch, the sample and the number of its copy alone.
    Evaluation resizes to `eval_size` and cuts nothing. Batches are `DetectionBatch`.

    Args:
        classes: Names of the classes in the order of their numbers, or a file with them: one name per line, or a JSON
            list. Null for the names that the data have.
        num_classes: Number of classes, at least 1; needed if nothing names them.
        batch_size: Number of samples in a batch on one device.
        num_workers: Number of processes that decode images on each rank; 0 decodes in the main process.
        image_size: Size of training batches with `LargeScaleJitter` in pixels: the side of a square, or (height,
            width); null for 1024. With `MultiScaleResize`, batches have the size of their largest image.
        eval_size: Sides of evaluation images, (short, longest): the short side becomes `short`, unless the long side
            would pass `longest`. The aspect stays. Null for the sides that belong to the augmentation.
        augmentation: Changes of training images: `MultiScaleResize` or `LargeScaleJitter`.
        masks: Whether training batches have the masks of the objects, if the data have masks. Detectors of boxes alone
            train faster without. Boxes after a crop are exact only with masks.
        antialias: Whether images are smoothed before they are made smaller. The published recipes do not.
        repeats: As in `ImageData`.
        epoch_samples: As in `ImageData`.
        remainder: As in `ImageData`.
        mean: Mean of each channel, for images in [0, 1]; it is subtracted.
        std: Standard deviation of each channel, for images in [0, 1], positive; the difference is divided by it.
        seed: Decides order and augmentation, together with the epoch.
        max_bad_fraction: Fraction of the samples read that may be unusable, in [0, 1]. If more are unusable, the run
            stops. At least 1000 samples are assumed.
        max_pixels: Largest number of pixels of an image. A larger image is not decoded and counts as a bad sample.

    Raises:
        DataError: If an argument is out of range; in `setup`, if the classes are not known.
    """

    def __init__(
        self,
        *,
        classes: list[str] | str | None = None,
        num_classes: int | None = None,
        batch_size: int = 2,
        num_workers: int = 2,
        image_size: int | tuple[int, int] | None = None,
        eval_size: tuple[int, int] | None = None,
        augmentation: DetectionAugmentation = MultiScaleResize(),  # noqa: B008  plain data, never changed
        masks: bool = True,
        antialias: bool = False,
        repeats: int = 1,
        epoch_samples: int | None = None,
        remainder: str = "drop",
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        seed: int = 0,
        max_bad_fraction: float = 0.01,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        size = None if image_size is None else check_image_size(image_size, self._where)
        if not isinstance(augmentation, DetectionAugmentation):
            raise DataError(
                f"{self._where}: augmentation is a class path with init_args, such as "
                f"ssmpretrain.datamodules.LargeScaleJitter; got {augmentation!r:.60}. Leave it out for "
                "MultiScaleResize."
            )
        fixed = augmentation.batch_size(size, self._where)
        self.eval_size = check_fitted_size(eval_size or augmentation.eval_size(size), "eval_size", self._where)
        self.image_size = fixed or self.eval_size  # the size that an encoder with positions is built for
        check_normalisation(mean, std, self._where)
        self._check(num_classes is None or num_classes > 0, "num_classes is at least 1", num_classes)
        self._check(max_pixels > 0, "max_pixels is at least 1", max_pixels)
        self.augmentation, self.masks, self.antialias = augmentation, masks, antialias
        self.mean, self.std, self.max_pixels, self.num_classes = mean, std, max_pixels, num_classes
        self._untrained = DroppedObjects()
        common: dict[str, Any] = {"mean": mean, "std": std, "seed": seed}
        common |= {"num_classes": num_classes, "max_pixels": max_pixels}
        super().__init__(
            train_batcher=DetectionBatcher(
                TrainDetection(augmentation, fixed, antialias, masks), dropped=self._untrained, **common
            ),
            eval_batcher=DetectionBatcher(EvalDetection(self.eval_size, antialias), **common),
            batch_size=batch_size,
            num_workers=num_workers,
            repeats=repeats,
            epoch_samples=epoch_samples,
            remainder=remainder,
            seed=seed,
            max_bad_fraction=max_bad_fraction,
            require_labels=False,
        )
        self._take_classes(classes)

    def dropped_objects(self) -> dict[str, dict[str, int]]:
        """Count the objects that were dropped from usable images so far, as {"train": {cause: count}, "val": ...}.

        Splits that were not read yet are left out. An object counts once, by any process of this rank.
        """
        return {name: count_causes(dropped) for name, dropped in self._dropped().items()}

    def dropped_records(self) -> list[dict[str, Any]]:
        """List the dropped objects.

        Each is a dictionary: split, epoch (0), cause, shard (the annotation file; empty for objects in shards), key
        (the image), object (its place in the list of the file, or of the image in shards, from 0).
        """
        return [
            {"split": name, "epoch": 0, "cause": one.cause, "shard": one.file, "key": one.key, "object": one.place}
            for name, dropped in self._dropped().items()
            for one in dropped
        ]

    def _dropped(self) -> dict[str, list[DroppedObject]]:
        """Return the dropped objects of each split that was read."""
        return {name: self._untrained.records() if name == "train" else [] for name in self._found}

    def _check_names(self, classes: Classes) -> None:
        """Raise if the number of classes is not known, or not `num_classes`."""
        if not classes and self.num_classes is None:
            raise DataError(
                f"{self._where}: the classes of the objects are named by classes, or by {CLASSES_FILE} beside the "
                "data; got neither. Give the names as classes, or their number as num_classes."
            )
        if classes and self.num_classes not in (None, len(classes.names)):
            raise DataError(
                f"{self._where}: num_classes is the number of the classes; got {self.num_classes:,}, and "
                f"{len(classes.names):,} names in {classes.source}. Correct one of them."
            )
