"""Batches of dense tasks: images of one size with class maps, or with objects.

B images, H x W pixels of the batch, n objects in an image
"""

from typing import Any, TypedDict

from torch import Tensor
from typing_extensions import NotRequired

from ssmpretrain.datamodules.decoding.batcher import ImageBatch

IGNORED = 255  # class of a pixel that neither trains nor counts


class SegmentationBatch(ImageBatch):
    """A batch of images with class maps. Smaller images are padded at the right and below, with 0 after normalisation.

    mask: Class of each pixel of `image`, (B, H, W), uint8, 0 to K - 1; 255 for a pixel to ignore and for padding.
    size: Height and width of each image without its padding, (B, 2), int64.
    whole_mask: In evaluation, the class maps at the sizes of their files, B tensors (h, w), uint8. Predictions are
        resized to them before they are compared.
    """

    mask: Tensor
    size: Tensor
    whole_mask: NotRequired[list[Tensor]]


class Objects(TypedDict):
    """The n objects of one image, in pixels of the batch's image.

    boxes: Corners x1, y1, x2, y2, (n, 4), float32; x2 and y2 are the outer edges.
    classes: Class of each object, (n,), int64, 0 to K - 1.
    masks: Pixels of each object, (n, H, W), bool; present if the data have masks.
    crowd: Whether the object is a group that is not separated, (n,), bool. It neither trains nor counts against.
    """

    boxes: Tensor
    classes: Tensor
    masks: NotRequired[Tensor]
    crowd: Tensor


class Annotation(TypedDict):
    """The annotation of one image at the size of its file, in plain data: the `json` of a shard, and COCO's terms.

    height, width: Size of the image in pixels.
    objects: One dict per object: category (int, 0 to K - 1), bbox (x, y, width, height), area (float, pixels), iscrowd
        (0 or 1), and segmentation (compressed RLE: size and counts, a str) if the data have masks.
    """

    height: int
    width: int
    objects: list[dict[str, Any]]


class DetectionBatch(ImageBatch):
    """A batch of images with objects. Smaller images are padded at the right and below, with 0 after normalisation.

    objects: The objects of each image, B dicts.
    size: Height and width of each image without its padding, (B, 2), int64.
    whole_size: Height and width of each file, (B, 2), int64. Boxes are scaled to it before they are compared.
    annotation: In evaluation, the annotation of each file.
    """

    objects: list[Objects]
    size: Tensor
    whole_size: Tensor
    annotation: NotRequired[list[Annotation]]
