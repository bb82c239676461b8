"""Images straight from a folder: for a first try, or for data small enough to need no packing."""

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np

from ssmpretrain.base.errors import SourceError
from ssmpretrain.datamodules.bad_samples import BadSample
from ssmpretrain.datamodules.files.image_files import ImageFiles, describe_left_out, find_images, read_file
from ssmpretrain.datamodules.files.local_files import patiently
from ssmpretrain.datamodules.image_data import ImageData
from ssmpretrain.datamodules.labels.classes import UNLABELLED, Classes, Labels
from ssmpretrain.datamodules.order.batches import PlannedBatches
from ssmpretrain.datamodules.order.loader import rank_and_world
from ssmpretrain.datamodules.shards.reading import RawSample

_log = logging.getLogger(__name__)


class FolderBatches(PlannedBatches):
    """Batches from the images of a folder; each file is a shard of its own, so that training shuffles all of them.

    Args:
        files: What to read.
        labels: How the numbers of its classes are read.
        limit: Read this many images, evenly chosen; None reads all.
        **options: As in `PlannedBatches`.
    """

    def __init__(self, files: ImageFiles, labels: Labels, *, limit: int | None = None, **options: Any) -> None:
        count = min(len(files.paths), limit or len(files.paths))
        chosen = [number * len(files.paths) // count for number in range(count)]
        super().__init__([1] * count, **options)
        self.folder = files.folder
        # One string instead of a million objects: forked workers copy every page in which they count a reference.
        self.paths = np.asarray([files.paths[number] for number in chosen])
        numbers = {name: number for number, name in enumerate(files.classes)}
        self.numbers = np.asarray([numbers.get(files.class_of(path) or "", -1) for path in self.paths.tolist()])
        self.labels = labels

    def labels_of(self, shard: int) -> Labels:
        """Those of the folder."""
        return self.labels

    def known_labels(self) -> Iterator[tuple[str, int]]:
        """All: one image of each class, and how many have none."""
        numbers, first, counts = np.unique(self.numbers, return_index=True, return_counts=True)
        for number, place, count in zip(numbers.tolist(), first.tolist(), counts.tolist(), strict=True):
            label = UNLABELLED if number < 0 else self.labels.read({"cls": str(number).encode()})
            more = f" and {count - 1:,} more" if number < 0 and count > 1 else ""
            yield f"{self.paths[place]}{more}", label

    def source(self, shard: int) -> tuple[str, int]:
        """All files go by the name of the folder."""
        return str(self.folder), len(self.paths)

    def read(self, shard: int, sample: int) -> RawSample:
        """A file and the number of its class in the folder."""
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


class ImageFolder(ImageData):
    """Images (jpg, jpeg, png, webp) in a folder and the folders below it; first-level sub-folders are the classes.

    Labels number the class folders of `train` in sorted order, unless a checkpoint numbers them otherwise. An image in
    the folder itself has label -1. Links to folders and files are followed, as classes often lie on several disks. A
    folder is read once, by its real name if it is one of those below, and a link to a folder that holds it is not
    entered; what is left out is said. Batches, transforms and order are those of `ImageShards`. Pack large data, or
    data on a network, into shards.

    Args:
        train: The folder.
        val: A folder whose sub-folders are among those of `train`, for validation; None for none.
        **kwargs: Arguments of `ImageData`: batch_size, num_workers, image_size, interpolation, crop_scale,
            horizontal_flip, auto_augment, color_jitter, photometric, random_erasing, repeats, epoch_samples,
            remainder, eval_crop_ratio, mean, std, seed, max_bad_fraction, max_pixels, require_labels.

    Raises:
        DataError: If an argument is out of range; in `setup`, if there are no images or too few.
        FileNotFoundError: In `setup`, if a folder is missing.
    """

    def __init__(self, train: str, val: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.train = train
        self.val = val
        self._files: dict[str, ImageFiles] = {}
        self._read: dict[str, Labels] = {}

    def num_samples(self, split: str) -> int:
        """Images in a split, "train" or "val"."""
        return len(self._find(split).paths)

    def _has_val(self) -> bool:
        return self.val is not None

    def _batches(self, split: str, *, train: bool, limit: int | None) -> FolderBatches:
        self._labels.number(split)
        [labels] = self._label_sources(split)
        return FolderBatches(self._find(split), labels, limit=limit, **self._batch_options(split, train=train, block=1))

    def _label_sources(self, split: str) -> list[Labels]:
        if split == "val" and not self._has_val():
            return []
        if split not in self._read:
            try:
                files = self._find(split)
            except FileNotFoundError:
                if split == "train" and self._has_val():  # that is evaluated without
                    return []
                raise
            self._read[split] = Labels(Classes(tuple(files.classes), f"the folders of {files.folder}"))
        return [self._read[split]]

    def _contents(self) -> list[tuple[str, int]]:
        return [(path, 1) for path in self._find("train").paths]

    def _find(self, split: str) -> ImageFiles:
        """The images of a split, listed once."""
        if split not in self._files:
            folder = self.train if split == "train" else self.val
            assert folder is not None, split
            where = f"{type(self).__name__}: {split}"
            self._files[split] = find_images(folder, where=where)
            if rank_and_world()[0] == 0:
                for line in describe_left_out(self._files[split].left_out):
                    _log.warning("%s: %s.", where, line)
        return self._files[split]
