"""Base class of the data modules with class maps: their common arguments, and the preparation of images."""

import contextlib
import logging
from typing import Any

import torch

from ssmpretrain.base import ranks
from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules.decoding.augmentation import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    check_image_size,
    check_normalisation,
)
from ssmpretrain.datamodules.decoding.decode import MAX_PIXELS
from ssmpretrain.datamodules.dense.dense_data import DenseData
from ssmpretrain.datamodules.faults.bad_samples import BadSample
from ssmpretrain.datamodules.labels.classes import CLASSES_FILE, Classes
from ssmpretrain.datamodules.order.batches import PlannedBatches
from ssmpretrain.datamodules.targets.batches import IGNORED
from ssmpretrain.datamodules.targets.class_map import MOST_CLASSES
from ssmpretrain.datamodules.targets.resizing import check_fitted_size
from ssmpretrain.datamodules.targets.segmentation import SegmentationBatcher
from ssmpretrain.datamodules.targets.segmentation_transforms import (
    EvalSegmentation,
    SegmentationAugmentation,
    TrainSegmentation,
)

_log = logging.getLogger(__name__)
_LOOKED_AT = 16  # number of masks in which a second class is looked for


class SegmentationData(DenseData):
    """Base class of `SegmentationShards` and `SegmentationFolder`: common arguments and the preparation of images.

    Training images are resized by a random factor, cropped to `image_size`, mirrored and changed in colour, together
    with their class maps; see `SegmentationAugmentation`. The result depends on the seed, the epoch, the sample and the
    number of its copy alone. Evaluation resizes to `eval_size` and crops nothing. Batches are `SegmentationBatch`.

    Args:
        classes: Names of the classes in the order of their numbers, or a file with them: one name per line, a JSON
            list, or ADE20K's table objectInfo150. Null for the names that the data have.
        num_classes: Number of classes, 1 to 255; needed if nothing else tells it. The attribute is the number that
            `setup` found if the data tell it without names.
        batch_size: Number of samples in a batch on one device.
        num_workers: Number of processes that decode images on each rank; 0 decodes in the main process.
        image_size: Size of training batches in pixels: the side of a square, or (height, width).
        eval_size: Sides of evaluation images, (short, longest): the short side becomes `short`, unless the long side
            would pass `longest`. The aspect stays. Null for the smaller side of image_size, and four times as much.
        augmentation: Changes of training images; see `SegmentationAugmentation`.
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
        batch_size: int = 4,
        num_workers: int = 2,
        image_size: int | tuple[int, int] = 512,
        eval_size: tuple[int, int] | None = None,
        augmentation: SegmentationAugmentation = SegmentationAugmentation(),  # noqa: B008  plain data, never changed
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
        self.image_size = check_image_size(image_size, self._where)
        short = min(self.image_size)
        self.eval_size = check_fitted_size(eval_size or (short, 4 * short), "eval_size", self._where)
        check_normalisation(mean, std, self._where)
        self.augmentation = augmentation
        self.antialias, self.mean, self.std, self.max_pixels = antialias, mean, std, max_pixels
        known = num_classes is None or (isinstance(num_classes, int) and 1 <= num_classes <= MOST_CLASSES)
        self._check(known, f"num_classes is from 1 to {MOST_CLASSES}, because 255 is ignored", num_classes)
        self._check(max_pixels > 0, "max_pixels is at least 1", max_pixels)
        self.num_classes = num_classes
        common: dict[str, Any] = {"mean": mean, "std": std, "seed": seed}
        common |= {"num_classes": num_classes, "max_pixels": max_pixels}
        train = TrainSegmentation(self.augmentation, self.image_size, self.eval_size, antialias)
        super().__init__(
            train_batcher=SegmentationBatcher(train, **common),
            eval_batcher=SegmentationBatcher(EvalSegmentation(self.eval_size, antialias), **common),
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

    @property
    def _is_255_known(self) -> bool:
        """Whether it is settled that 255 in a mask is no object."""
        return False

    def _batches(self, split: str, *, train: bool, limit: int | None) -> PlannedBatches:
        batches = super()._batches(split, train=train, limit=limit)
        assert isinstance(batches.batcher, SegmentationBatcher)
        batches.batcher.num_classes = self.num_classes  # opening the data may have told it
        return batches

    def _try_some(self, split: str) -> None:
        super()._try_some(split)
        if self._is_255_known:
            return
        batches = self._batches(split, train=False, limit=None)
        if (line := _describe_single_class(batches)) and ranks.rank() == 0:
            _log.warning("%s: %s: %s", self._where, split, line)

    def _check_names(self, classes: Classes) -> None:
        """Raise if the number of classes is not known, too large, or not `num_classes`."""
        count = self.num_classes
        if not classes and count is None:
            raise DataError(
                f"{self._where}: the classes of the pixels are named by classes, or by {CLASSES_FILE} beside the data; "
                "got neither. Give the names as classes, or their number as num_classes."
            )
        if classes and (len(classes.names) > MOST_CLASSES or count not in (None, len(classes.names))):
            said = "" if count is None else f", and num_classes {count:,}"
            raise DataError(
                f"{self._where}: a class map has up to {MOST_CLASSES} classes, and num_classes is their number; got "
                f"{len(classes.names):,} names in {classes.source}{said}. Correct one of them."
            )


def _describe_single_class(batches: PlannedBatches) -> str:
    """Return a sentence for the user if a few masks have at most one class, as masks of 0 and 255 do; otherwise ""."""
    assert isinstance(batches.batcher, SegmentationBatcher)
    of_one_shard = [(0, sample) for sample in range(_LOOKED_AT)]  # other shards may have to be fetched
    places = of_one_shard if batches.sizes[0] >= _LOOKED_AT else list(batches.spread(_LOOKED_AT))
    pixels = torch.zeros(IGNORED + 1, dtype=torch.int64)
    for shard, sample in places:
        with contextlib.suppress(BadSample):  # counted later, when training reads it
            mask = batches.batcher.class_map(batches.read(shard, sample), batches.labels_of(shard))
            pixels += mask.flatten().bincount(minlength=IGNORED + 1)
            if int(pixels[:IGNORED].count_nonzero()) > 1:
                return ""
    ignored = float(pixels[IGNORED] / pixels.sum()) if int(pixels.sum()) else 0.0
    found = "no class" if not int(pixels[:IGNORED].sum()) else f"class {int(pixels[:IGNORED].argmax())} alone"
    return (
        f"{len(places)} masks that were looked at have {found}, and {ignored:.0%} of their pixels are ignored. If "
        "their 255 is an object, read or pack the masks with a class_map such as {0: background, 255: object}."
    )
