"""Geometry of an image and its objects: flip, resize and crop, with boxes and masks that follow.

n objects, h x w pixels of the image at present
"""

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssmpretrain.datamodules.targets.batches import Annotation, Objects
from ssmpretrain.datamodules.targets.resizing import resize_image
from ssmpretrain.datamodules.targets.run_lengths import Rle, decode_mask

_THINNEST = 0.01  # pixels; a thinner rest of a box does not train


class Frame:
    """An image and its objects, while the image is flipped, resized and cropped.

    The pixels of masks are looked up once, at the end: each step only notes from which row and column of the file a
    pixel comes. Resizing takes the pixel whose centre is nearest.

    Args:
        image: The decoded image, (3, h, w), uint8.
        annotation: Its annotation; the objects stay in its order.
        antialias: Whether images are smoothed before they are made smaller.
    """

    def __init__(self, image: Tensor, annotation: Annotation, antialias: bool) -> None:
        self.image = image
        self._objects, self._antialias = annotation["objects"], antialias
        x, y, w, h = np.asarray([one["bbox"] for one in self._objects], dtype=np.float64).reshape(-1, 4).T
        self._boxes = np.stack([x, y, x + w, y + h], axis=1)
        self._rows, self._columns = (np.arange(side) for side in self.size)
        self._is_cropped = False

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image at present."""
        return self.image.shape[-2], self.image.shape[-1]

    def flip(self) -> None:
        """Mirror the image: left becomes right."""
        self.image = self.image.flip(-1)
        self._columns = self._columns[::-1]
        self._boxes[:, [0, 2]] = self.size[1] - self._boxes[:, [2, 0]]

    def resize(self, size: tuple[int, int]) -> None:
        """Resize to a height and a width."""
        (h, w), (H, W) = self.size, size
        self.image = resize_image(self.image, size, antialias=self._antialias)
        self._rows, self._columns = self._rows[_nearest(h, H)], self._columns[_nearest(w, W)]
        self._boxes *= (W / w, H / h, W / w, H / h)

    def crop(self, top: int, left: int, height: int, width: int) -> None:
        """Keep a window that lies inside the image."""
        self._is_cropped |= (height, width) != self.size
        rows, columns = slice(top, top + height), slice(left, left + width)
        self.image, self._rows, self._columns = self.image[:, rows, columns], self._rows[rows], self._columns[columns]
        self._boxes -= (left, top, left, top)

    def objects(self, *, masks: bool) -> Objects:
        """Return the objects that are left, with their masks if `masks` holds and the annotation has them.

        After a crop, the box of an object with a mask is the box of the pixels that are left of the mask. Without a
        mask, and without a crop, it is the box of the annotation, cut at the border. An object is left out if it has no
        pixel left, or its box no width or height.
        """
        h, w = self.size
        boxes = self._boxes.clip(0, (w, h, w, h))
        found = {
            "classes": torch.tensor([one["category"] for one in self._objects], dtype=torch.int64),
            "crowd": torch.tensor([bool(one["iscrowd"]) for one in self._objects], dtype=torch.bool),
        }
        is_left = np.ones(len(boxes), dtype=bool)
        if masks and all("segmentation" in one for one in self._objects):
            pixels = self._pixels([one["segmentation"] for one in self._objects])
            tight, is_left = boxes_of(pixels)
            boxes = tight if self._is_cropped else boxes
            found["masks"] = torch.from_numpy(pixels)
        is_left &= (boxes[:, 2:] - boxes[:, :2] >= _THINNEST).all(axis=1)
        found["boxes"] = torch.from_numpy(boxes.astype(np.float32))
        kept = torch.from_numpy(is_left)
        left = {name: values[kept] for name, values in found.items()}
        return cast(Objects, left)

    def _pixels(self, codes: Sequence[Rle]) -> NDArray[np.bool_]:
        """Return the masks of the image at present, (n, h, w)."""
        pixels = np.empty((len(codes), *self.size), dtype=bool)
        for mask, code in zip(pixels, codes, strict=True):
            mask[...] = decode_mask(code)[self._rows][:, self._columns]
        return pixels


def boxes_of(masks: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the boxes x1, y1, x2, y2 of masks (n, h, w), (n, 4), and which masks have a pixel, (n,).

    x2 and y2 are the outer edges: the box of one pixel has width and height 1.
    """
    edges = []
    for axis in (1, 2):
        is_met: NDArray[np.bool_] = np.asarray(masks.any(axis=axis))  # (n, w), then (n, h)
        side = is_met.shape[1]
        edges += [is_met.argmax(axis=1), side - is_met[:, ::-1].argmax(axis=1)] if side and len(masks) else []
    if not edges:
        return np.zeros((len(masks), 4)), np.zeros(len(masks), dtype=bool)
    x1, x2, y1, y2 = edges
    return np.stack([x1, y1, x2, y2], axis=1).astype(np.float64), np.asarray(masks.any(axis=(1, 2)))


def _nearest(side: int, new: int) -> NDArray[np.int64]:
    """Return, for each of `new` pixels in a row, the one of `side` pixels whose centre is nearest."""
    return ((2 * np.arange(new) + 1) * side) // (2 * new)
