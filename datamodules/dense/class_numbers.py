"""Meaning of the numbers in masks: names of the classes, and the class of each number."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ssmpretrain.base.errors import DataError
from ssmpretrain.base.wording import few, nearest
from ssmpretrain.datamodules.labels.classes import Classes
from ssmpretrain.datamodules.targets.batches import IGNORED
from ssmpretrain.datamodules.targets.class_map import MOST_CLASSES, NUMBERS, Table, class_table


@dataclass(frozen=True)
class ClassNumbers:
    """Classes of the pixels of a data set of masks.

    Args:
        classes: Names of the classes; without names if only their number is known.
        count: Number K of classes.
        mapping: Class of each number in the masks; None if they are the classes.
        ignore: Further numbers to ignore.
        reduce_zero: Whether `mapping` ignores 0, and takes one from each other number.
    """

    classes: Classes
    count: int
    mapping: Mapping[int, int] | None
    ignore: tuple[int, ...]
    reduce_zero: bool

    @property
    def is_translated(self) -> bool:
        """Whether the numbers in the masks differ from the classes."""
        return self.mapping is not None or bool(self.ignore)

    @cached_property
    def table(self) -> Table:
        """Class of each number, as `class_table` returns it."""
        return class_table(self.count, self.mapping, self.ignore)

    @property
    def described(self) -> str:
        """A clause for messages that says which numbers have a class."""
        if self.mapping is None:
            return f"the {self.count:,} classes are 0 to {self.count - 1:,}"
        if self.reduce_zero:
            return f"with reduce_zero, the {self.count:,} classes are 1 to {self.count:,}"
        return f"class_map has {few([str(number) for number in sorted(self.mapping)], 8)}"


def class_numbers(
    classes: Classes,
    count: int | None,
    class_map: Mapping[int, int | str] | None,
    *,
    reduce_zero: bool,
    ignore: Sequence[int],
    where: str,
) -> ClassNumbers:
    """Work out the class of each number in the masks.

    Args:
        classes: Names of the classes; without names if they are not known.
        count: Number of classes; None if only the names or `class_map` give it.
        class_map: Class of each number, by its number or its name; 255 ignores it. None if the numbers are the classes.
            If `classes` has no names, the names in `class_map` are the classes, in their order.
        reduce_zero: Whether 0 is ignored, and each other number is one more than its class.
        ignore: Numbers to ignore.
        where: Name of the data module, which opens every message.

    Raises:
        DataError: If the settings contradict each other, or do not say how many classes there are.
    """
    wrong = [number for number in [*(class_map or ()), *ignore] if type(number) is not int or not 0 <= number < NUMBERS]
    if wrong:
        raise DataError(f"{where}: a mask holds numbers from 0 to {NUMBERS - 1:,}; got {wrong[0]!r}. Correct it.")
    if class_map is not None and reduce_zero:
        raise DataError(
            f"{where}: reduce_zero says the class of each number, and so does class_map; got both. Leave out "
            "reduce_zero, and give 0: 255 in class_map."
        )
    if class_map is not None and not classes and any(isinstance(label, str) for label in class_map.values()):
        names = dict.fromkeys(label for label in class_map.values() if label != IGNORED)
        if not all(isinstance(name, str) for name in names):
            raise DataError(f"{where}: class_map has names of classes, or their numbers; got both. Give classes too.")
        classes = Classes(tuple(map(str, names)), f"{where}: class_map")
    mapping = None if class_map is None else _by_number(class_map, classes, where)
    if mapping is not None and count is None and not classes:
        count = 1 + max((label for label in mapping.values() if label != IGNORED), default=-1)
    number = len(classes.names) or count
    if number is None:
        raise DataError(
            f"{where}: the masks have numbers, whose classes are not known. Give the names as classes, their number as "
            "num_classes, or the class of each number as class_map, as in {0: background, 1: road}."
        )
    if not 1 <= number <= MOST_CLASSES:
        raise DataError(f"{where}: there are 1 to {MOST_CLASSES} classes, because 255 is ignored; got {number:,}.")
    beyond = [old for old, new in (mapping or {}).items() if new != IGNORED and not 0 <= new < number]
    if mapping and beyond:
        raise DataError(
            f"{where}: class_map gives classes from 0 to {number - 1:,}, or 255 to ignore a number; got "
            f"{beyond[0]}: {mapping[beyond[0]]}. Correct class_map, or name all classes."
        )
    if reduce_zero:
        mapping = {0: IGNORED} | {label + 1: label for label in range(number)}
    return ClassNumbers(classes, number, mapping, tuple(ignore), reduce_zero)


def _by_number(class_map: Mapping[int, int | str], classes: Classes, where: str) -> dict[int, int]:
    numbers = {name: number for number, name in enumerate(classes.names)}
    found = {}
    for old, new in class_map.items():
        if isinstance(new, str) and new not in numbers:
            raise DataError(
                f"{where}: class_map names classes of {classes.source or 'classes'}; got {new!r} for {old}. "
                f"{nearest(new, numbers, 'The classes')}"
            )
        found[old] = numbers[new] if isinstance(new, str) else new
    return found
