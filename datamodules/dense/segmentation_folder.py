"""Data module for images with masks in folders."""

import logging
from typing import Any

from ssmpretrain.base import ranks
from ssmpretrain.datamodules.dense.mask_source import MaskSource
from ssmpretrain.datamodules.dense.mask_split import MaskSplit
from ssmpretrain.datamodules.dense.segmentation_data import SegmentationData
from ssmpretrain.datamodules.files.image_files import describe_left_out

_log = logging.getLogger(__name__)


class SegmentationFolder(SegmentationData):
    """Images (jpg, jpeg, png, webp) in a folder and all folders below it, each with a mask in another folder.

    A mask is a PNG of the size of its image with one number per pixel: grey, of up to 16 bits, or with a palette, whose
    indices are the numbers. By default the numbers are the classes, 0 to K - 1, and 255 is ignored. An image without a
    mask, a mask of another size, and a number without a class make a bad sample.

    Args:
        train: Folder of the training images; with `layout`, the folder of the whole data set.
        val: The same for validation; with `layout`, usually the same folder. None for no validation.
        layout: "ade20k", "voc", "cityscapes" (with labelTrainIds), "cityscapes_ids" (as it is downloaded) or "folders"
            (images/train, images/val, masks/train, masks/val). It gives the places, the numbers and the classes. None
            for any other two folders.
        train_masks: Folder of the training masks, without `layout`. It may be the folder of the images.
        val_masks: Folder of the validation masks, without `layout`.
        mask: Template of the path of a mask below its folder, without `layout`. {stem} is the name of the image without
            suffix and `image_ending`, and {folder} its folder below the folder of the images. The default is
            "{folder}/{stem}.png".
        image_ending: End of the images' names, before the suffix, that masks do not share, without `layout`. With
            "_rgb", the image 7_rgb.jpg has the stem "7", and 7_depth.png is left out.
        class_map: Class of each number in the masks, by number or name, as {0: background, 24: rider, 25: rider};
            255 ignores a number. A number that it lacks makes a bad sample. It replaces the numbers and the classes of
            `layout`.
        ignore: Further numbers in the masks to ignore.
        reduce_zero: Whether 0 is ignored, and each other number is one more than its class, as in ADE20K. None for
            the rule of `layout`.
        **kwargs: Arguments of `SegmentationData`: classes, num_classes, batch_size, num_workers, image_size, eval_size,
            augmentation, antialias, repeats, epoch_samples, remainder, mean, std, seed, max_bad_fraction, max_pixels.
            Without `classes`, the names come from `class_map`, `layout`, or without these from a classes.json in the
            folder of the masks or the one above.

    Raises:
        DataError: If an argument is out of range or contradicts another; in `setup`, if the classes are not known, too
            many images have no mask, or images are too few.
        FileNotFoundError: In `setup`, if a folder is missing.
    """

    def __init__(
        self,
        train: str,
        val: str | None = None,
        *,
        layout: str | None = None,
        train_masks: str | None = None,
        val_masks: str | None = None,
        mask: str | None = None,
        image_ending: str | None = None,
        class_map: dict[int, int | str] | None = None,
        ignore: list[int] | None = None,
        reduce_zero: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.train, self.val = train, val
        self._source = MaskSource(
            where=self._where,
            images={split: path for split, path in (("train", train), ("val", val)) if path is not None},
            masks={split: path for split, path in (("train", train_masks), ("val", val_masks)) if path is not None},
            layout=layout,
            mask=mask,
            image_ending=image_ending,
            class_map=class_map,
            ignore=ignore or (),
            reduce_zero=reduce_zero,
            classes=self._own_classes,
            num_classes=self.num_classes,
        )

    def _open(self, split: str) -> MaskSplit:
        found = self._source.open(split, self.max_bad_fraction)
        if not found.numbers.classes:
            self.num_classes = found.numbers.count
        if ranks.rank() == 0:
            for line in describe_left_out(found.files.left_out):
                _log.warning("%s: %s: %s.", self._where, split, line)
            if shared := found.files.describe_shared():
                _log.warning("%s: %s: %s", self._where, split, shared)
        return found

    @property
    def _is_255_known(self) -> bool:
        return self._source.is_255_known
