"""Images with masks of one split that lie in folders, and their batches."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ssmpretrain.base.errors import SourceError
from ssmpretrain.datamodules.dense.class_numbers import ClassNumbers
from ssmpretrain.datamodules.dense.mask_files import MaskFiles
from ssmpretrain.datamodules.faults.bad_samples import BadSample
from ssmpretrain.datamodules.files.image_files import read_file
from ssmpretrain.datamodules.files.patience import patiently
from ssmpretrain.datamodules.labels.classes import Labels
from ssmpretrain.datamodules.order.batches import PlannedBatches
from ssmpretrain.datamodules.splits.image_split import ImageSplit
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
        self.folders, self.numbers = files.folders, numbers
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
        content = _read(self.folders.images, image, "unreadable files")
        encoded = _read(self.folders.masks, mask, "images without a mask", image)
        if self.numbers.is_translated:
            try:
                encoded = encode_classes(decode_classes(encoded, self.numbers.table, self.numbers.described))
            except BadSample as bad:
                raise BadSample(bad.cause, bad.detail, image) from None
        extension = image.rpartition(".")[2].lower()
        return {"__key__": image, "jpg" if extension == "jpeg" else extension: content, CLASS_MAP: encoded}


class MaskBatches(PlannedBatches):
    """Batches of images with masks. Each image counts as a shard, so that training shuffles all images.

    Args:
        reader: Reads the images and their masks.
        labels: The classes of the pixels.
        **options: Arguments of `PlannedBatches`.
    """

    def __init__(self, reader: MaskReader, labels: Labels, **options: Any) -> None:
        super().__init__([1] * len(reader), **options)
        self.reader, self.labels = reader, labels

    def labels_of(self, shard: int) -> Labels:
        """Return the classes of the pixels; they are the same for all images."""
        return self.labels

    def known_labels(self) -> Iterator[tuple[str, int]]:
        """Yield nothing: an image has no label of its own."""
        return iter(())

    def source(self, shard: int) -> tuple[str, int]:
        """Return the name of the folder, which stands for all its files in messages, and the number of files."""
        return str(self.reader.folders.images), len(self.reader)

    def read(self, shard: int, sample: int) -> RawSample:
        """Return one sample; see `MaskReader.read`."""
        return self.reader.read(shard)


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

    def batches(self, *, limit: int | None, **options: Any) -> MaskBatches:
        """Return the images in batches; see `ImageSplit.batches`."""
        return MaskBatches(self.reader(limit), self._labels, **options)

    def reader(self, limit: int | None = None) -> MaskReader:
        """Return the reader of the images; see `ImageSplit.batches` for `limit`."""
        return MaskReader(self.files, self.numbers, limit)


def _read(folder: Path, path: str, cause: str, key: str = "") -> bytes:
    """Read a file; raise a BadSample of this cause if it does not exist, otherwise of unreadable files."""
    try:
        return patiently(folder, lambda: read_file(folder / path))
    except SourceError as error:
        detail = str(error).removeprefix(f"{folder}: ").rstrip(".")
        if error.cause == "missing shards":
            raise BadSample(cause, f"no {folder.name}/{path}", key or path) from None
        raise BadSample("unreadable files", f"{path}: {detail}", key or path) from None
