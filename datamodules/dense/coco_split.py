"""Images with objects of one split: a folder and an annotation file, and their batches."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssmpretrain.base import ranks
from ssmpretrain.base.errors import DataError
from ssmpretrain.base.shown_names import shown
from ssmpretrain.base.wording import few
from ssmpretrain.datamodules.dense.coco_file import CocoFile, describe_counts, read_coco
from ssmpretrain.datamodules.faults.bad_samples import BadSample
from ssmpretrain.datamodules.files.folders import find_folder, look_around
from ssmpretrain.datamodules.files.image_files import IMAGE_EXTENSIONS
from ssmpretrain.datamodules.labels.classes import Labels
from ssmpretrain.datamodules.splits.image_split import ImageSplit
from ssmpretrain.datamodules.splits.sample_batches import SampleBatches, image_extension, read_beside
from ssmpretrain.datamodules.tar.sample import RawSample
from ssmpretrain.datamodules.targets.annotations import check_size
from ssmpretrain.datamodules.targets.polygons import coco_masks, encode_polygons
from ssmpretrain.datamodules.targets.run_lengths import decode_runs

_log = logging.getLogger(__name__)
_LOOKED_FOR = 256  # number of images that are looked for before the first is read


class CocoReader:
    """Reads images and their objects, in the form of samples of a shard.

    Args:
        folder: Folder of the images.
        file: The annotation file.
        chosen: Numbers of the images in the file, (n,).
    """

    def __init__(self, folder: Path, file: CocoFile, chosen: NDArray[np.int64]) -> None:
        self.folder, self.file, self.chosen = folder, file, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def read(self, number: int) -> RawSample:
        """Return the content of an image, and its annotation as `json`, with masks as run-length codes.

        Raises:
            BadSample: If the file is missing, cannot be read, or is no image of the annotation's size.
        """
        place = int(self.chosen[number])
        name, annotation = str(self.file.names[place]), self.file.annotation(place)
        extension = image_extension(name)
        if extension not in IMAGE_EXTENSIONS:
            raise BadSample("images of other kinds", f"not {', '.join(IMAGE_EXTENSIONS)}", name)
        content = read_beside(self.folder, name, "missing images")
        h, w = annotation["height"], annotation["width"]
        try:
            check_size(content, h, w)
        except BadSample as bad:
            raise BadSample(bad.cause, bad.detail, name) from None
        for one in annotation["objects"]:
            if isinstance(one.get("segmentation"), list):
                one["segmentation"] = encode_polygons(one["segmentation"], h, w)
            if one["area"] is None:
                one["area"] = float(decode_runs(one["segmentation"])[1::2].sum())
        return {"__key__": name, extension: content, "json": json.dumps(annotation).encode()}


class CocoSplit(ImageSplit):
    """Images with objects in a folder and an annotation file.

    Args:
        folder: Folder of the images.
        file: The annotation file.
        drop_empty: Whether images without an object, or with crowds alone, are left out.
    """

    def __init__(self, folder: Path, file: CocoFile, *, drop_empty: bool) -> None:
        self.folder, self.file = folder, file
        self._chosen = np.flatnonzero(file.trainable > 0) if drop_empty else np.arange(len(file.names))
        self._labels = Labels(file.classes)

    @property
    def num_samples(self) -> int:
        """Number of images."""
        return len(self._chosen)

    @property
    def labels(self) -> list[Labels]:
        """The classes of the objects, in a list of one."""
        return [self._labels]

    def contents(self) -> list[tuple[str, int]]:
        """Return (file name, 1) for each image, because each image counts as a shard of one sample."""
        return [(name, 1) for name in self.file.names[self._chosen].tolist()]

    def batches(self, *, limit: int | None, **options: Any) -> SampleBatches:
        """Return the images in batches; see `ImageSplit.batches`."""
        return SampleBatches(self.reader(limit), self._labels, **options)

    def reader(self, limit: int | None = None) -> CocoReader:
        """Return the reader of the images; see `ImageSplit.batches` for `limit`."""
        count = min(self.num_samples, limit or self.num_samples)
        return CocoReader(self.folder, self.file, self._chosen[np.arange(count) * self.num_samples // max(count, 1)])


def open_coco(images: str, annotations: str, where: str, *, masks: bool = True, drop_empty: bool = False) -> CocoSplit:
    """Read an annotation file, and look for a few of its images. Rank 0 logs what was dropped or mended.

    Args:
        images: Folder of the images.
        annotations: The annotation file.
        where: Name of the data module and split, or of the command, which opens every message.
        masks: Whether masks are read, if the file has masks.
        drop_empty: As in `CocoSplit`.

    Raises:
        FileNotFoundError: If the folder or the file does not exist.
        DataError: As `read_coco`; if masks need pycocotools, which is not installed; or if most images are missing.
    """
    folder = find_folder(images, where=where)
    file = read_coco(annotations, where, masks=masks)
    if file.polygons:
        coco_masks(where)
    split = CocoSplit(folder, file, drop_empty=drop_empty)
    if split.num_samples == 0:
        raise DataError(
            f"{where}: {file.path}: no image has an object that is no crowd. Set empty: keep, or correct the file."
        )
    names = [name for name, _ in split.contents()]
    looked_for = names[:: max(1, len(names) // _LOOKED_FOR)]
    missing = [name for name in looked_for if not (folder / name).exists()]
    if len(missing) > len(looked_for) / 2:
        raise DataError(
            f"{where}: the images of {file.path} lie in {folder}; {len(missing):,} of {len(looked_for):,} that were "
            f"looked for are missing, such as {shown(few(missing, 3))}; {look_around(folder / 'any')}. Correct the "
            "folder, or the paths in file_name, which are relative to it."
        )
    if ranks.rank() == 0:
        if file.dropped:
            dropped = f"{sum(file.dropped.values()):,} of {file.listed:,} objects"
            _log.warning("%s: %s: dropped %s: %s.", where, file.path.name, dropped, describe_counts(file.dropped))
        if file.mended:
            _log.warning("%s: %s: mended objects: %s.", where, file.path.name, describe_counts(file.mended))
    return split
