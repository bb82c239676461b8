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
    usual: int | None = None,
) -> ClassNumbers:
    """Work out the class of each number in the masks.

    Args:
        classes: Names of the classes; without names if they are not known.
        count: Number of classes that the user gives; None if only the names, the layout or `class_map` give it.
        class_map: Class of each number, by its number or its name; 255 ignores it. None if the numbers are the classes.
            If `classes` has no names, the names in `class_map` are the classes, in their order.
        reduce_zero: Whether 0 is ignored, and each other number is one more than its class.
        ignore: Numbers to ignore.
        where: Name of the data module, which opens every message.
        usual: Number of classes of the layout, if nothing else tells it.

    Raises:
        DataError: If the settings contradict each other, or do not say how many classes there are.
    """
    wrong = [number for number in [*(class_map or ()), *ignore] if type(number) is not int or not 0 <= number < NUMBERS]
    if wrong:
        raise DataError(f"{where}: a mask holds numbers from 0 to {NUMBERS - 1:,}; got {wrong[0]!r}. Correct it.")
    for old, new in (class_map or {}).items():
        if type(new) not in (int, str):
            raise DataError(
                f"{where}: class_map gives the class of a number, by its number or name; got {new!r:.60} for {old}. "
                "Correct this entry."
            )
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
    number = _number(classes, count, mapping, usual, where)
    if reduce_zero:
        mapping = {0: IGNORED} | {label + 1: label for label in range(number)}
    return ClassNumbers(classes, number, mapping, tuple(ignore), reduce_zero)


def _number(
    classes: Classes, count: int | None, mapping: Mapping[int, int] | None, usual: int | None, where: str
) -> int:
    """Return the number of the classes; raise if it is not known, or something contradicts it."""
    names = len(classes.names)
    if classes and count not in (None, names):
        raise DataError(
            f"{where}: num_classes is the number of the classes; got {count:,}, and {names:,} names in "
            f"{classes.source}. Leave out num_classes, or correct one of them."
        )
    number = names or count
    if number is None and mapping is not None:
        _check_mapping(mapping, MOST_CLASSES, where)
        return 1 + max(label for label in mapping.values() if label != IGNORED)
    number = usual if number is None else number
    if number is None:
        raise DataError(
            f"{where}: the masks have numbers, whose classes are not known. Give the names as classes, their number as "
            "num_classes, or the class of each number as class_map, as in {0: background, 1: road}."
        )
    if not 1 <= number <= MOST_CLASSES:
        raise DataError(
            f"{where}: there are 1 to {MOST_CLASSES} classes, because 255 is ignored; got {number:,}. Correct the "
            "names, or num_classes."
        )
    if mapping is not None:
        _check_mapping(mapping, number, where)
    return number


def _check_mapping(mapping: Mapping[int, int], most: int, where: str) -> None:
    """Raise if `class_map` gives a number something else than a class from 0 to `most` - 1 or 255, or no class."""
    for old, new in mapping.items():
        if new != IGNORED and not 0 <= new < most:
            raise DataError(
                f"{where}: class_map gives classes from 0 to {most - 1:,}, or 255 to ignore a number; got {old}: "
                f"{new}. Correct class_map, or name all classes."
            )
    if all(new == IGNORED for new in mapping.values()):
        raise DataError(
            f"{where}: class_map gives numbers a class, and 255 ignores; got no class for any number. Give one, as in "
            "{0: background, 1: road}."
        )


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
