"""Several views of a decoded image: the groups of views that a recipe names, and the transform that makes them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from torch import Tensor

from ssmpretrain.base.errors import DataError
from ssmpretrain.base.seeds import stable_hash
from ssmpretrain.datamodules.decoding.augmentation import Augmentation
from ssmpretrain.datamodules.decoding.decode import MAX_PIXELS
from ssmpretrain.datamodules.decoding.photometric import Photometric
from ssmpretrain.datamodules.decoding.transform import ImageTransform

_OF_A_SINGLE_VIEW = {"auto_augment": None, "color_jitter": 0, "photometric": None, "random_erasing": 0}  # and none


@dataclass
class ViewGroup:
    """Views of an image that are made in the same way: a random crop, perhaps mirrored, then changes of its colours.

    Args:
        count: Number of views in the group, at least 1.
        size: Side of the square views in pixels, or (height, width); null for `image_size` of the data.
        crop_scale: Area of the random crop as a fraction of the image, (least, most) in (0, 1].
        local: Whether the views are local ones, which a teacher does not see. Groups of global views come first and
            share one size.
        horizontal_flip: Whether a view is mirrored with probability 1/2; null for `horizontal_flip` of the data.
        photometric: Changes of colour; see `Photometric`. Null for none.

    Raises:
        DataError: If an argument is out of range.

    Source: Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments"
        (arXiv:2006.09882), sec. 3.2: multi-crop.
    """

    count: int = 1
    size: int | tuple[int, int] | None = None
    crop_scale: tuple[float, float] = (0.05, 1.0)
    local: bool = False
    horizontal_flip: bool | None = None
    photometric: Photometric | None = None

    def __post_init__(self) -> None:
        _check(_is_count(self.count), "count is a whole number of at least 1", self.count)
        size, scale = self.size, self.crop_scale
        holds = size is None or _is_count(size) or (_is_pair(size) and all(map(_is_count, size)))
        _check(holds, "size is a positive number of pixels, or height and width", size)
        holds = _is_pair(scale) and 0 < scale[0] <= scale[1] <= 1
        _check(holds, "crop_scale is (least, most) with 0 < least <= most <= 1", scale)
        holds = self.photometric is None or isinstance(self.photometric, Photometric)
        _check(holds, "photometric is a Photometric or None", self.photometric)

    def size_in(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Return (height, width) of the views, for the size of the images of the data."""
        if self.size is None:
            return image_size
        return (self.size, self.size) if isinstance(self.size, int) else (self.size[0], self.size[1])


class ViewsTransform:
    """Make the views of a decoded image. Each view depends on the seed and its number alone, not on the other groups.

    Each view is made by itself. torchvision's kernels on a batch of views would give all of them one factor of
    brightness or hue, and would save little: nothing at 224 pixels, a quarter of hue at 96 (docs/benchmarks.md).

    Args:
        groups: The groups of views; global ones come first.
        augmentation: Settings of the data module, which hold for whatever a group does not say.
        where: Name of the data module, which opens every message.

    Attributes:
        augments: True, as of every transform of training images.
        num_global: Number of global views.
        sizes: (H, W) of each size, in the order in which the groups name them.

    Raises:
        DataError: If the groups contradict each other, or an option of a single view is set.
    """

    augments = True

    def __init__(self, groups: Sequence[ViewGroup], augmentation: Augmentation, where: str) -> None:
        _check_groups(groups, augmentation, where)
        self.num_global = sum(group.count for group in groups if not group.local)
        sizes = [group.size_in(augmentation.size) for group in groups]
        self.sizes = list(dict.fromkeys(sizes))
        self._views: list[tuple[int, ImageTransform]] = []  # of each view: the number of its size, and its transform
        for group, size in zip(groups, sizes, strict=True):
            flip = augmentation.horizontal_flip if group.horizontal_flip is None else group.horizontal_flip
            transform = augmentation.view_transform(size, group.crop_scale, flip, group.photometric)
            self._views += [(self.sizes.index(size), transform)] * group.count

    def __call__(self, image: Tensor, *, seed: int) -> list[list[Tensor]]:
        """Make the views of (3, h, w) uint8: for each size the list of its views, (3, H, W) uint8."""
        views: list[list[Tensor]] = [[] for _ in self.sizes]
        for number, (size, transform) in enumerate(self._views):
            views[size].append(transform(image, seed=stable_hash("view", seed, number)))
        return views


def _check_groups(groups: Sequence[ViewGroup], augmentation: Augmentation, where: str) -> None:
    """Raise if groups contradict each other, or stand beside an option of a single view."""
    other = [group for group in groups if not isinstance(group, ViewGroup)] if isinstance(groups, list) else [groups]
    if other:
        raise DataError(
            f"{where}: views is a list of ViewGroup; got {other[0]!r:.60}. Import ViewGroup from "
            "ssmpretrain.datamodules."
        )
    for name, none in _OF_A_SINGLE_VIEW.items():
        if (value := getattr(augmentation, name)) != none:
            raise DataError(
                f"{where}: beside views, {name} has no effect; got {value}. Leave it out; `photometric` of each group "
                "changes the colours of its views."
            )
    local = [group.local for group in groups]
    if all(local):
        raise DataError(f"{where}: views has a group of global views; got none. Leave `local` out in one of them.")
    if local != sorted(local):
        raise DataError(f"{where}: in views, groups of global views come first; got local ones before. Reorder them.")
    sizes = [group.size_in(augmentation.size) for group in groups]
    of_globals = sorted(set(sizes[: local.index(True)] if True in local else sizes))
    if len(of_globals) > 1:
        raise DataError(f"{where}: global views share one size; got {of_globals}. Give them one size in data.views.")
    pixels = sum(group.count * math.prod(size) for group, size in zip(groups, sizes, strict=True))
    if pixels > MAX_PIXELS:
        raise DataError(
            f"{where}: the views of an image have at most {MAX_PIXELS:,} pixels together; got {pixels:,}. Use fewer or "
            "smaller views."
        )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_pair(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, list | tuple) and len(value) == 2


def _check(holds: bool, what: str, got: object) -> None:
    if not holds:
        raise DataError(f"ViewGroup: {what}; got {got}. Correct it in data.views.")
