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
from ssmpretrain.datamodules.faults.dropped_objects import DroppedObject, DroppedObjects, count_causes
from ssmpretrain.datamodules.files.folders import find_folder, look_around
from ssmpretrain.datamodules.files.image_files import IMAGE_EXTENSIONS
from ssmpretrain.datamodules.labels.classes import Labels
from ssmpretrain.datamodules.splits.image_split import ImageSplit
from ssmpretrain.datamodules.splits.sample_batches import SampleBatches, image_extension, read_beside
from ssmpretrain.datamodules.tar.sample import RawSample
from ssmpretrain.datamodules.targets.annotations import EMPTY_MASK, check_size
from ssmpretrain.datamodules.targets.polygons import coco_masks, encode_polygons
from ssmpretrain.datamodules.targets.run_lengths import count_pixels

_log = logging.getLogger(__name__)
_LOOKED_FOR = 256  # number of images that are looked for before the first is read


class CocoReader:
    """Reads images and their objects, in the form of samples of a shard.

    Args:
        folder: Folder of the images.
        file: The annotation file.
        chosen: Numbers of the images in the file, (n,).
        empty: Counts objects whose mask covers no pixel, and leaves them out; None keeps them, for evaluation.
    """

    def __init__(self, folder: Path, file: CocoFile, chosen: NDArray[np.int64], empty: DroppedObjects | None) -> None:
        self.folder, self.file, self.chosen, self.empty = folder, file, chosen, empty

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
        annotation["objects"] = [one for one in annotation["objects"] if self._draw(one, name, h, w)]
        return {"__key__": name, extension: content, "json": json.dumps(annotation).encode()}

    def _draw(self, one: dict[str, Any], name: str, h: int, w: int) -> bool:
        """Draw the mask of an object and compute its area, in place; return whether the object is kept."""
        place = one.pop("place")
        if "segmentation" not in one:
            return True
        if isinstance(one["segmentation"], list):
            one["segmentation"] = encode_polygons(one["segmentation"], h, w)
        pixels = count_pixels(one["segmentation"])
        one["area"] = float(pixels) if one["area"] is None else one["area"]
        if not pixels and self.empty is not None:
            self.empty.add(DroppedObject(EMPTY_MASK, str(self.file.path), name, place))
        return pixels > 0 or self.empty is None


class CocoSplit(ImageSplit):
    """Images with objects in a folder and an annotation file.

    Args:
        folder: Folder of the images.
        file: The annotation file.
        train: Whether the objects train; in evaluation, those with a mask without a pixel stay.
        drop_empty: Whether images without an object, or with crowds alone, are left out.
    """

    def __init__(self, folder: Path, file: CocoFile, *, train: bool, drop_empty: bool) -> None:
        self.folder, self.file = folder, file
        self._empty = DroppedObjects() if train else None
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
        chosen = self._chosen[np.arange(count) * self.num_samples // max(count, 1)]
        return CocoReader(self.folder, self.file, chosen, self._empty)

    def dropped(self) -> list[DroppedObject]:
        """Return the objects that were dropped so far, when the file was read and in any process of this rank."""
        return [*self.file.dropped, *(self._empty.records() if self._empty else ())]


def open_coco(
    images: str,
    annotations: str,
    where: str,
    *,
    train: bool,
    masks: bool = True,
    drop_empty: bool = False,
    max_dropped: float = 1.0,
) -> CocoSplit:
    """Read an annotation file, and look for a few of its images. Rank 0 logs what was dropped or mended.

    Args:
        images: Folder of the images.
        annotations: The annotation file.
        where: Name of the data module and split, or of the command, which opens every message.
        train: As in `read_coco` and `CocoSplit`.
        masks: Whether masks are read, if the file has masks.
        drop_empty: As in `CocoSplit`.
        max_dropped: As in `read_coco`.

    Raises:
        FileNotFoundError: If the folder or the file does not exist.
        DataError: As `read_coco`; if masks need pycocotools, which is not installed; or if most images are missing.
    """
    folder = find_folder(images, where=where)
    file = read_coco(annotations, where, masks=masks, train=train, max_dropped=max_dropped)
    if file.polygons:
        coco_masks(where)
    split = CocoSplit(folder, file, train=train, drop_empty=drop_empty)
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
            dropped = f"{len(file.dropped):,} of {file.listed:,} objects"
            causes = describe_counts(count_causes(file.dropped))
            _log.warning("%s: %s: dropped %s: %s.", where, file.path.name, dropped, causes)
        if file.mended:
            _log.warning("%s: %s: mended objects: %s.", where, file.path.name, describe_counts(file.mended))
    return split
