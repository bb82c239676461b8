"""Images with masks of one split that lie in folders, and their batches."""

from typing import Any

import numpy as np

from ssmpretrain.datamodules.dense.class_numbers import ClassNumbers
from ssmpretrain.datamodules.dense.mask_files import MaskFiles
from ssmpretrain.datamodules.faults.bad_samples import BadSample
from ssmpretrain.datamodules.labels.classes import Labels
from ssmpretrain.datamodules.splits.image_split import ImageSplit
from ssmpretrain.datamodules.splits.sample_batches import SampleBatches, image_extension, read_beside
from ssmpretrain.datamodules.tar.sample import RawSample
from ssmpretrain.datamodules.targets.class_map import CLASS_MAP, decode_classes, encode_classes


class MaskReader:
    """Reads images and their masks, in the form of samples of a shard.

    Args:
        files: The images and their masks.
        numbers: Classes of the numbers in the masks.
        limit: Number of images to read, evenly spread; None reads all.
    """

    def __init__(self, files: MaskFiles, numbers: ClassNumbers, limit: int | None = None) -> None:
        total = len(files.images)
        count = min(total, limit or total)
        chosen = [number * total // count for number in range(count)]
        self.folder, self.masks_folder, self.numbers = files.folders.images, files.folders.masks, numbers
        # Arrays instead of millions of strings: a forked worker copies every page on which it counts references.
        self.images, self.masks = (np.asarray([paths[i] for i in chosen]) for paths in (files.images, files.masks))

    def __len__(self) -> int:
        return len(self.images)

    def read(self, number: int) -> RawSample:
        """Return the content of an image, and its class map as `seg.png`, with the final numbers of the classes.

        Raises:
            BadSample: If a file is missing or cannot be read, or a number in the mask has no class.
        """
        image, mask = str(self.images[number]), str(self.masks[number])
        content = read_beside(self.folder, image, "unreadable files")
        encoded = read_beside(self.masks_folder, mask, "images without a mask", image, "unreadable masks")
        if self.numbers.is_translated:
            try:
                encoded = encode_classes(decode_classes(encoded, self.numbers.table, self.numbers.described))
            except BadSample as bad:
                raise BadSample(bad.cause, bad.detail, image) from None
        return {"__key__": image, image_extension(image): content, CLASS_MAP: encoded}


class MaskSplit(ImageSplit):
    """Images with masks in folders.

    Args:
        files: The images and their masks.
        numbers: Classes of the numbers in the masks.
    """

    def __init__(self, files: MaskFiles, numbers: ClassNumbers) -> None:
        self.files, self.numbers = files, numbers
        self._labels = Labels(numbers.classes)

    @property
    def num_samples(self) -> int:
        """Number of images."""
        return len(self.files.images)

    @property
    def labels(self) -> list[Labels]:
        """The classes of the pixels, in a list of one."""
        return [self._labels]

    def contents(self) -> list[tuple[str, int]]:
        """Return (path, 1) for each image, because each image counts as a shard of one sample."""
        return [(path, 1) for path in self.files.images]

    def batches(self, *, limit: int | None, **options: Any) -> SampleBatches:
        """Return the images in batches; see `ImageSplit.batches`."""
        return SampleBatches(self.reader(limit), self._labels, **options)

    def reader(self, limit: int | None = None) -> MaskReader:
        """Return the reader of the images; see `ImageSplit.batches` for `limit`."""
        return MaskReader(self.files, self.numbers, limit)
