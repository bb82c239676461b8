"""Batches of samples that a reader gives one by one, such as images with masks in folders."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from ssmpretrain.base.errors import SourceError
from ssmpretrain.datamodules.faults.bad_samples import BadSample
from ssmpretrain.datamodules.files.image_files import read_file
from ssmpretrain.datamodules.files.patience import patiently
from ssmpretrain.datamodules.labels.classes import Labels
from ssmpretrain.datamodules.order.batches import PlannedBatches
from ssmpretrain.datamodules.tar.sample import RawSample


class SampleReader(Protocol):
    """Reader of samples, in the form of samples of a shard.

    Attributes:
        folder: Folder of the images, which stands for all their files in messages.
    """

    folder: Path

    def __len__(self) -> int: ...

    def read(self, number: int) -> RawSample:
        """Return one sample.

        Raises:
            BadSample: If it cannot be read.
        """


class SampleBatches(PlannedBatches):
    """Batches of samples that a reader gives. Each counts as a shard, so that training shuffles all of them.

    Args:
        reader: Reads the samples.
        labels: The classes of pixels or objects.
        **options: Arguments of `PlannedBatches`.
    """

    def __init__(self, reader: SampleReader, labels: Labels, **options: Any) -> None:
        super().__init__([1] * len(reader), **options)
        self.reader, self.labels = reader, labels

    def labels_of(self, shard: int) -> Labels:
        """Return the classes of pixels or objects; they are the same for all images."""
        return self.labels

    def known_labels(self) -> Iterator[tuple[str, int]]:
        """Yield nothing: an image has no label of its own."""
        return iter(())

    def source(self, shard: int) -> tuple[str, int]:
        """Return the name of the folder, which stands for all its files in messages, and the number of samples."""
        return str(self.reader.folder), len(self.reader)

    def read(self, shard: int, sample: int) -> RawSample:
        """Return one sample; see `SampleReader.read`."""
        return self.reader.read(shard)


def read_beside(folder: Path, path: str, missing: str, key: str = "", unreadable: str = "unreadable files") -> bytes:
    """Read a file below a folder; a server or network disk gets several attempts.

    Args:
        folder: The folder.
        path: Path of the file relative to it.
        missing: Cause of the BadSample if the file does not exist.
        key: Name of the sample; the path by default.
        unreadable: Cause of the BadSample if the file cannot be read.

    Raises:
        BadSample: If the file does not exist, or cannot be read.
    """
    try:
        return patiently(folder, lambda: read_file(folder / path))
    except SourceError as error:
        detail = str(error).removeprefix(f"{folder}: ").rstrip(".")
        if error.cause == "missing shards":
            raise BadSample(missing, f"no {folder / path}", key or path) from None
        raise BadSample(unreadable, f"{folder / path}: {detail}", key or path) from None


def image_extension(path: str) -> str:
    """Return the field of a sample that holds an image with this path: its suffix, and jpg for each JPEG."""
    extension = path.rpartition(".")[2].lower()
    return "jpg" if extension == "jpeg" else extension
