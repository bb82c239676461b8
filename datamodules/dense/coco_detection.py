"""Data module for images with objects in COCO's form: a folder and an annotation file."""

from typing import Any

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules.dense.coco_split import CocoSplit, open_coco
from ssmpretrain.datamodules.dense.detection_data import DetectionData
from ssmpretrain.datamodules.faults.dropped_objects import DroppedObject


class CocoDetection(DetectionData):
    """Images (jpg, jpeg, png, webp) in a folder, with an annotation file of COCO instances (JSON).

    The file is read once, in `setup`. Categories become classes 0 to K - 1 in the order of their ids; validation is
    matched by the names. Masks may be polygons, which pycocotools draws, or run-length codes. If any object of a file
    has a mask, objects without one are dropped. A file without masks gives boxes alone.

    Objects are dropped, and counted by cause, if their box is not four finite numbers; their category or image is
    unknown; or their mask has another size, is broken, or is a polygon of fewer than three points. In training also if
    their area is 0 or less, their mask has no pixel, or their box is narrower or lower than 1 pixel or lies outside of
    the image: evaluation keeps these as pycocotools does, so that the average precision is that of the file.
    `bad_samples.jsonl` of the run lists dropped objects. A missing iscrowd counts as 0. An image that is missing, or of
    another size than the file says, is a bad sample.

    Args:
        train: Folder of the training images; `file_name` is relative to it.
        train_annotations: Annotation file of the training images.
        val: Folder of the validation images; None for no validation.
        val_annotations: Annotation file of the validation images.
        empty: "keep" or "drop" training images without an object, or with crowds alone; mmdet and detectron2 drop
            them. (mmdet also drops images with a side below 32 pixels; here they stay.) Validation keeps all images.
        **kwargs: Arguments of `DetectionData`. With `masks` false, masks are not read. `max_bad_fraction` also limits
            the fraction of the objects of a file that may be dropped.

    Raises:
        DataError: If an argument is out of range; in `setup`, if an annotation file is of another kind or contradicts
            itself, too many objects cannot be used, most images are missing, or masks need pycocotools and it is not
            installed.
        FileNotFoundError: In `setup`, if a folder or a file is missing.
    """

    def __init__(
        self,
        train: str,
        train_annotations: str,
        val: str | None = None,
        val_annotations: str | None = None,
        *,
        empty: str = "keep",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if (val is None) != (val_annotations is None):
            given, lacking = ("val", "val_annotations") if val is not None else ("val_annotations", "val")
            raise DataError(
                f"{self._where}: validation needs val, a folder, and val_annotations, a file; got {given} alone. Give "
                f"{lacking} too, or leave out both."
            )
        if empty not in ("keep", "drop"):
            raise DataError(
                f"{self._where}: empty is keep or drop, for training images without objects; got {empty!r}. Use one "
                "of them."
            )
        self.train, self.train_annotations = train, train_annotations
        self.val, self.val_annotations = val, val_annotations
        self.empty = empty

    def _dropped(self) -> dict[str, list[DroppedObject]]:
        return {name: split.dropped() for name, split in self._found.items() if isinstance(split, CocoSplit)}

    def _open(self, split: str) -> CocoSplit:
        train = split == "train"
        images, annotations = (self.train, self.train_annotations) if train else (self.val, self.val_annotations)
        assert images is not None and annotations is not None, split
        return open_coco(
            images,
            annotations,
            f"{self._where}: {split}",
            train=train,
            masks=self.masks,
            drop_empty=train and self.empty == "drop",
            max_dropped=self.max_bad_fraction,
        )
