"""Images with masks in folders: settings that say where they are and what their numbers mean."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ssmpretrain.base.errors import DataError
from ssmpretrain.base.wording import nearest
from ssmpretrain.datamodules.dense.class_numbers import ClassNumbers, class_numbers
from ssmpretrain.datamodules.dense.layouts import DEFAULT_MASK, LAYOUTS, Layout
from ssmpretrain.datamodules.dense.mask_files import MaskFolders, check_template, find_masks
from ssmpretrain.datamodules.dense.mask_split import MaskSplit
from ssmpretrain.datamodules.files.folders import find_folder
from ssmpretrain.datamodules.labels.classes import CLASSES_FILE, Classes, read_classes
from ssmpretrain.datamodules.targets.batches import IGNORED


@dataclass(frozen=True)
class MaskSource:
    """Images with masks in folders; `SegmentationFolder` documents the arguments.

    Args:
        where: Name of the data module or command, which opens every message.
        images: Folder of the images of "train" and "val"; with `layout`, the folder of the whole data set.
        masks: Folder of the masks of "train" and "val"; without `layout`.
        classes: Names of the classes that the user gives; None for those of the data.
        num_classes: Number of classes that the user gives.
        follow_links: Whether links that leave the folders are followed.
        layout, mask, image_ending, class_map, ignore, reduce_zero: As in `SegmentationFolder`.

    Raises:
        DataError: If an argument is out of range or contradicts another.
    """

    where: str
    images: Mapping[str, str]
    masks: Mapping[str, str]
    layout: str | None
    mask: str | None
    image_ending: str | None
    class_map: Mapping[int, int | str] | None
    ignore: Sequence[int]
    reduce_zero: bool | None
    classes: Classes | None
    num_classes: int | None
    follow_links: bool = True

    def __post_init__(self) -> None:
        said = {"mask": self.mask, "image_ending": self.image_ending}
        given = [name for name, value in said.items() if value is not None] + [f"{split}_masks" for split in self.masks]
        if self.layout is not None and self.layout not in LAYOUTS:
            raise DataError(
                f"{self.where}: layout is the name of a layout, or null for two folders; got {self.layout!r}. "
                f"{nearest(self.layout, LAYOUTS, 'The layouts')}"
            )
        if self.layout is not None and given:
            raise DataError(
                f"{self.where}: layout {self.layout} says which mask belongs to an image; got {given[0]} too. "
                "Leave out one of them."
            )
        lacking = [split for split in self.images if split not in self.masks]
        if self.layout is None and lacking:
            raise DataError(
                f"{self.where}: the masks are in {lacking[0]}_masks, or in the places of a layout "
                f"({', '.join(LAYOUTS)}); got neither. Give one of them."
            )
        if self.mask is not None:
            check_template(self.mask, self.where)

    def open(self, split: str, max_bad_fraction: float) -> MaskSplit:
        """Find the images of "train" or "val" and their masks.

        Raises:
            DataError: If the classes are not known, or as `find_masks`.
            FileNotFoundError: If a folder is missing.
        """
        where = f"{self.where}: {split}"
        folders = self._folders(split, where)
        numbers = self._numbers(split, folders)
        files = find_masks(folders, max_bad_fraction, where, follow_links=self.follow_links)
        return MaskSplit(files, numbers)

    @property
    def is_255_known(self) -> bool:
        """Whether the layout or the user says what 255 in a mask means."""
        if self.class_map is not None:
            return IGNORED in self.class_map or IGNORED in self.ignore
        return IGNORED in self.ignore or bool(self._rules.classes or self._rules.num_classes)

    @cached_property
    def _rules(self) -> Layout:
        return LAYOUTS[self.layout] if self.layout else Layout(images={}, masks={}, names_file=CLASSES_FILE)

    def _folders(self, split: str, where: str) -> MaskFolders:
        root = find_folder(self.images[split], where=where)
        if self.layout is None:
            masks = find_folder(self.masks[split], where=where)
            return MaskFolders(root, masks, self.mask or DEFAULT_MASK, self.image_ending or "")
        rules = self._rules
        listed = root / rules.lists[split] if split in rules.lists else None
        return MaskFolders(
            root / rules.images[split], root / rules.masks[split], rules.mask, rules.image_ending, listed
        )

    def _numbers(self, split: str, folders: MaskFolders) -> ClassNumbers:
        """Return the classes of the numbers in the masks of a split."""
        rules, own = self._rules, self.class_map is not None
        reduce_zero = rules.reduce_zero and not own if self.reduce_zero is None else self.reduce_zero
        return class_numbers(
            self.classes or self._names(split, folders),
            self.num_classes,
            self.class_map if own else rules.class_map,
            reduce_zero=reduce_zero,
            ignore=self.ignore,
            where=self.where,
            usual=None if own else rules.num_classes,
        )

    def _names(self, split: str, folders: MaskFolders) -> Classes:
        """Return the names that the layout or a file in the data gives; without names if they are not known."""
        rules = self._rules
        if self.class_map is not None and any(isinstance(label, str) for label in self.class_map.values()):
            return Classes((), self.where)  # the names in class_map are the classes
        if self.class_map is None and rules.classes:
            return Classes(rules.classes, f"layout {self.layout}")
        if self.layout is not None and self.class_map is not None:
            return Classes((), self.where)  # the names of the layout are those of its own numbers
        beside = [Path(self.images[split]).expanduser()] if self.layout else [folders.masks, folders.masks.parent]
        files = [folder / rules.names_file for folder in beside]
        return next((read_classes(file) for file in files if file.is_file()), Classes((), str(files[0])))
