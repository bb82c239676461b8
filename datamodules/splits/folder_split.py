"""Images of one split that lie in a folder, read file by file."""

import logging
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from ssmpretrain.base import ranks
from ssmpretrain.base.errors import SourceError
from ssmpretrain.datamodules.faults.bad_samples import BadSample
from ssmpretrain.datamodules.files.image_files import ImageFiles, describe_left_out, find_images, read_file
from ssmpretrain.datamodules.files.patience import patiently
from ssmpretrain.datamodules.labels.classes import UNLABELLED, Classes, Labels
from ssmpretrain.datamodules.order.batches import PlannedBatches
from ssmpretrain.datamodules.splits.image_split import ImageSplit
from ssmpretrain.datamodules.tar.sample import RawSample

_log = logging.getLogger(__name__)


class FolderBatches(PlannedBatches):
    """Batches of images in a folder. Each file counts as a shard, so that training shuffles all files.

    Args:
        files: The images.
        labels: Reader of the labels, which are the numbers of the class folders.
        limit: Number of images to read, evenly spread; None reads all.
        **options: Arguments of `PlannedBatches`.
    """

    def __init__(self, files: ImageFiles, labels: Labels, *, limit: int | None = None, **options: Any) -> None:
        count = min(len(files.paths), limit or len(files.paths))
        chosen = [number * len(files.paths) // count for number in range(count)]
        super().__init__([1] * count, **options)
        self.folder = files.folder
        # One array instead of a million strings: a forked worker copies every page on which it counts references.
        self.paths = np.asarray([files.paths[number] for number in chosen])
        numbers = {name: number for number, name in enumerate(files.classes)}
        self.numbers = np.asarray([numbers.get(files.class_of(path) or "", -1) for path in self.paths.tolist()])
        self.labels = labels

    def labels_of(self, shard: int) -> Labels:
        """Return the object that reads the labels of the folder; it is the same for all files."""
        return self.labels

    def known_labels(self) -> Iterator[tuple[str, int]]:
        """Yield (path, label) of one image of each class; an entry for unlabelled images also gives their number."""
        numbers, first, counts = np.unique(self.numbers, return_index=True, return_counts=True)
        for number, place, count in zip(numbers.tolist(), first.tolist(), counts.tolist(), strict=True):
            label = UNLABELLED if number < 0 else self.labels.read({"cls": str(number).encode()})
            more = f" and {count - 1:,} more" if number < 0 and count > 1 else ""
            yield f"{self.paths[place]}{more}", label

    def source(self, shard: int) -> tuple[str, int]:
        """Return the name of the folder, which stands for all its files in messages, and the number of files."""
        return str(self.folder), len(self.paths)

    def read(self, shard: int, sample: int) -> RawSample:
        """Return the content of an image file, and the number of its class as `cls` if it has one."""
        path = str(self.paths[shard])
        try:
            content = patiently(self.folder, lambda: read_file(self.folder / path))
        except SourceError as error:
            detail = str(error).removeprefix(f"{self.folder}: ").rstrip(".")
            raise BadSample("unreadable files", detail, path) from None
        raw: RawSample = {"__key__": path, path.rpartition(".")[2].lower(): content}
        if self.numbers[shard] >= 0:
            raw["cls"] = str(self.numbers[shard]).encode()
        return raw


class FolderSplit(ImageSplit):
    """Images in a folder and all folders below it.

    Args:
        folder: The folder to search.
        where: Name of the data module and split, which opens every message.

    Raises:
        FileNotFoundError: If the folder does not exist.
        DataError: If it holds no image.
    """

    def __init__(self, folder: str, where: str) -> None:
        self.files = find_images(folder, where=where)
        if ranks.rank() == 0:
            for line in describe_left_out(self.files.left_out):
                _log.warning("%s: %s.", where, line)

    @property
    def num_samples(self) -> int:
        """Number of images."""
        return len(self.files.paths)

    @cached_property
    def labels(self) -> list[Labels]:
        """Reader of the labels, in a list of one; labels number the class folders."""
        return [Labels(Classes(tuple(self.files.classes), f"the folders of {self.files.folder}"))]

    def contents(self) -> list[tuple[str, int]]:
        """Return (path, 1) for each image, because each file counts as a shard of one sample."""
        return [(path, 1) for path in self.files.paths]

    def batches(self, *, limit: int | None, **options: Any) -> FolderBatches:
        """Return the images in batches; see `ImageSplit.batches`."""
        return FolderBatches(self.files, self.labels[0], limit=limit, **options)
