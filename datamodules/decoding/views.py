"""Several views of a decoded image: the groups of views that a recipe names, and the transform that makes them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ssmpretrain.base.errors import DataError
from ssmpretrain.base.seeds import stable_hash
from ssmpretrain.datamodules.decoding.augmentation import Augmentation, check_image_size
from ssmpretrain.datamodules.decoding.decode import MAX_PIXELS
from ssmpretrain.datamodules.decoding.photometric import Photometric
from ssmpretrain.datamodules.decoding.transform import ImageTransform


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
        if not isinstance(self.count, int) or self.count < 1:
            raise DataError(f"ViewGroup: count is at least 1; got {self.count}. Correct it in data.views.")
        scale = self.crop_scale
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise DataError(
                f"ViewGroup: crop_scale is (least, most) with 0 < least <= most <= 1; got {scale}. Correct it in "
                "data.views."
            )
        if self.size is not None:
            check_image_size(self.size, "ViewGroup")


class ViewsTransform:
    """Make the views of a decoded image. Each view depends on the seed and its number alone, not on the other groups.

    Args:
        groups: The groups of views; global ones come first.
        augmentation: Settings of the data module, which hold for whatever a group does not say.
        where: Name of the data module, which opens every message.

    Attributes:
        augments: True, as of every transform of training images.
        num_global: Number of global views.
        sizes: (H, W) of each size, in the order in which the groups name them.

    Raises:
        DataError: If the groups contradict each other.
    """

    augments = True

    def __init__(self, groups: Sequence[ViewGroup], augmentation: Augmentation, where: str) -> None:
        for group in groups:
            if not isinstance(group, ViewGroup):
                raise DataError(
                    f"{where}: views is a list of ViewGroup; got {group!r:.60}. Import ViewGroup from "
                    "ssmpretrain.datamodules."
                )
        _check_alone(augmentation, where)
        sizes = [_size_of(group, augmentation) for group in groups]
        _check_groups(groups, sizes, where)
        self.num_global = sum(group.count for group in groups if not group.local)
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


def _size_of(group: ViewGroup, augmentation: Augmentation) -> tuple[int, int]:
    return augmentation.size if group.size is None else check_image_size(group.size, "ViewGroup")


def _check_alone(augmentation: Augmentation, where: str) -> None:
    """Raise if an option that changes the colours of a single view is set."""
    for name, none in (("auto_augment", None), ("color_jitter", 0), ("photometric", None), ("random_erasing", 0)):
        if (value := getattr(augmentation, name)) != none:
            raise DataError(
                f"{where}: beside views, {name} has no effect; got {name} {value}. Leave it out; changes of colour are "
                "set by photometric of each group of views."
            )


def _check_groups(groups: Sequence[ViewGroup], sizes: Sequence[tuple[int, int]], where: str) -> None:
    """Raise if there is no global view, or global views do not come first with one size, or views are too large."""
    local = [group.local for group in groups]
    if all(local):
        raise DataError(f"{where}: views has a group of global views; got none. Leave `local` out in one of them.")
    if local != sorted(local):
        raise DataError(f"{where}: in views, groups of global views come first; got local ones before. Reorder them.")
    first = {size for size, is_local in zip(sizes, local, strict=True) if not is_local}
    if len(first) > 1:
        raise DataError(f"{where}: global views share one size; got {sorted(first)}. Give them one size in data.views.")
    pixels = sum(group.count * math.prod(size) for group, size in zip(groups, sizes, strict=True))
    if pixels > MAX_PIXELS:
        raise DataError(
            f"{where}: the views of an image have at most {MAX_PIXELS:,} pixels together; got {pixels:,}. Use fewer or "
            "smaller views."
        )
