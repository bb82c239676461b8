"""Layouts of segmentation data sets on disk: ADE20K, Pascal VOC, Cityscapes, and plain folders."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

TRAIN, VAL = "train", "val"
DEFAULT_MASK = "{folder}/{stem}.png"


@dataclass(frozen=True)
class Layout:
    """Places of images and masks below the folder of a data set, and the meaning of the numbers in the masks.

    Args:
        images, masks: Folder of the images and of the masks of "train" and "val".
        mask: Template of a mask below the folder of the masks. {folder} is the folder of the image below the folder of
            the images, and {stem} its name without suffix and `image_ending`.
        image_ending: Part of an image's stem that a mask does not share, such as "_leftImg8bit".
        lists: File of "train" and "val" that lists the stems of the images; empty if all images are used.
        reduce_zero: Whether 0 is ignored, and each other number is one more than its class.
        class_map: Class of each number, {number in the mask: class, 255 to ignore it}; None if they are the classes.
        names_file: File below the folder of the data set that names the classes; empty for none.
        classes: Names of the classes in the order of their numbers; empty if only their number is fixed.
        num_classes: Number of classes; None if only the names give it.
    """

    images: Mapping[str, str]
    masks: Mapping[str, str]
    mask: str = DEFAULT_MASK
    image_ending: str = ""
    lists: Mapping[str, str] = field(default_factory=dict)
    reduce_zero: bool = False
    class_map: Mapping[int, int] | None = None
    names_file: str = ""
    classes: tuple[str, ...] = ()
    num_classes: int | None = None


_VOC = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
)
_CITYSCAPES = {  # number in labelIds: class, in the order of labelTrainIds
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck",
    28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip
_TRAIN_IDS = Layout(
    images={TRAIN: "leftImg8bit/train", VAL: "leftImg8bit/val"},
    masks={TRAIN: "gtFine/train", VAL: "gtFine/val"},
    mask="{folder}/{stem}_gtFine_labelTrainIds.png",
    image_ending="_leftImg8bit",
    classes=tuple(_CITYSCAPES.values()),
)

LAYOUTS = {
    "ade20k": Layout(
        images={TRAIN: "images/training", VAL: "images/validation"},
        masks={TRAIN: "annotations/training", VAL: "annotations/validation"},
        reduce_zero=True,
        names_file="objectInfo150.txt",
        num_classes=150,
    ),
    "voc": Layout(
        images={TRAIN: "JPEGImages", VAL: "JPEGImages"},
        masks={TRAIN: "SegmentationClass", VAL: "SegmentationClass"},
        lists={TRAIN: "ImageSets/Segmentation/train.txt", VAL: "ImageSets/Segmentation/val.txt"},
        classes=tuple(_VOC.split()),
    ),
    "cityscapes": _TRAIN_IDS,
    # The files as they are downloaded, before cityscapesScripts writes the labelTrainIds.
    "cityscapes_ids": replace(
        _TRAIN_IDS,
        mask="{folder}/{stem}_gtFine_labelIds.png",
        class_map={number: 255 for number in range(34)} | {number: new for new, number in enumerate(_CITYSCAPES)},
    ),
    "folders": Layout(
        images={TRAIN: "images/train", VAL: "images/val"},
        masks={TRAIN: "masks/train", VAL: "masks/val"},
        names_file="classes.json",
    ),
}
