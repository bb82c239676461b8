"""Classes of a set of images: their names in the order of the labels, and translation to the labels of another set."""

import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssmpretrain.base.errors import DataError
from ssmpretrain.base.shown_names import shown
from ssmpretrain.base.wording import few
from ssmpretrain.datamodules.faults.bad_samples import BadSample
from ssmpretrain.datamodules.files.image_files import read_file

CLASSES_FILE = "classes.json"  # beside the shards
UNLABELLED = -1
_MOST_NAMES = 16 << 20  # largest number of bytes of a file of names
_NUMBER = re.compile(r"[+-]?[0-9]{1,18}(\.0*)?").fullmatch


@dataclass(frozen=True)
class Classes:
    """List of class names.

    Args:
        names: Names in the order of the labels; empty if they are not known.
        source: File or folder that gives the names, used in messages.
    """

    names: tuple[str, ...]
    source: str

    def __bool__(self) -> bool:
        return bool(self.names)

    def numbers_in(self, first: "Classes", *, where: str) -> tuple[int, ...] | None:
        """Return the label of each of these classes in the list `first`.

        Args:
            first: The list that numbers the classes.
            where: Name of the data module and split, which opens every message.

        Returns:
            Labels in `first`, in the order of these classes. None if both lists are equal, or one is not known.

        Raises:
            DataError: If `first` lacks one of these classes, or has a name twice.
        """
        if not self or not first or self.names == first.names:
            return None
        numbers = {name: number for number, name in enumerate(first.names)}
        lacking = [name for name in self.names if name not in numbers]
        if lacking:
            raise DataError(
                f"{where}: the classes of {self.source} are among those of {first.source} ({_few(first.names)}); got "
                f"{_few(lacking)}, which the latter lacks. Rename or remove these classes, or pack the shards again "
                "with `shards pack --classes` and one list for both."
            )
        if len(numbers) < len(first.names):
            raise DataError(
                f"{where}: classes of two different lists are matched by their names; got {self.source}, and "
                f"{first.source}, which has a name twice. Give each class a different name."
            )
        return tuple(numbers[name] for name in self.names)


class Labels:
    """Reader of the labels of one source of images, which is a folder or the shards in a folder.

    Args:
        own: Classes of this source, in the order of its labels.
        present: Whether samples may have labels.

    Attributes:
        judged: Whether an unreadable label makes its sample a bad sample. If not, the sample counts as unlabelled.
    """

    def __init__(self, own: Classes, *, present: bool = True) -> None:
        self.present, self.judged = present, False
        self._left_out = False
        self._numbers: tuple[int, ...] | None = None
        self.mean(own)

    def mean(self, own: Classes) -> None:
        """Set the classes of this source, in the order of its labels."""
        self.own = self._first = own
        self._by_name = _numbered(own.names)

    def number_by(self, first: Classes, *, where: str) -> str:
        """Number the labels from now on as the list `first` does.

        Returns:
            A sentence for the user about the change, or an empty string if there is nothing to say.

        Raises:
            DataError: If `first` lacks one of the classes, or has a name twice.
        """
        if first == self._first:
            return ""
        numbered_so = first.names == self._first.names
        self._numbers, self._first, self._left_out = self.own.numbers_in(first, where=where), first, False
        self._by_name = _numbered(first.names or self.own.names)
        if numbered_so:
            return ""
        if self._numbers is not None:
            return (
                f"{where}: the labels of {self.own.source} ({_few(self.own.names)}) are numbered as in {first.source} "
                f"({_few(first.names)}), by the names of the classes."
            )
        if bool(self.own) == bool(first) or not self.present:
            return ""
        known, unknown = (first, self.own) if first else (self.own, first)
        return (
            f"{where}: the classes of the labels of {unknown.source} are not known; they are assumed to be those of "
            f"{known.source}. Put a {CLASSES_FILE} beside the shards: a list of the names."
        )

    @property
    def numbers(self) -> tuple[int, ...] | None:
        """Number of each class of this source in the list that numbers the labels; None if they are the same."""
        return self._numbers

    @property
    def known(self) -> Classes:
        """The classes that bound the labels: those of this source, or if they are not known, those of the list."""
        return self.own or self._first

    def leave_out(self) -> None:
        """Treat all samples as unlabelled."""
        self._left_out = True

    def read(self, raw: dict[str, Any]) -> int:
        """Return the label of a raw sample; -1 if it has none.

        The label is a number or the name of a class, in the member `cls` or in the field `label` of the member `json`.

        Raises:
            BadSample: If labels are judged, and the label cannot be read or belongs to no class.
        """
        if self._left_out:
            return UNLABELLED
        try:
            return self._of(_label_in(raw))
        except BadSample:
            if self.judged:
                raise
            return UNLABELLED

    def complaint(self, raw: dict[str, Any]) -> str:
        """Return the reason why the label of a raw sample cannot be read.

        The text is empty if the label can be read, if the sample has none, or if all labels are ignored.
        """
        if self._left_out:
            return ""
        try:
            self._of(_label_in(raw))
        except BadSample as bad:
            return bad.detail
        return ""

    def _of(self, said: object) -> int:
        number, known = _as_number(said), self.known
        if number is None and isinstance(said, str) and said in self._by_name:
            return self._by_name[said]
        if number is None or number < UNLABELLED:
            names = known.source if known else f"a {CLASSES_FILE} beside the shards"
            what = f"expected an integer of at least 0, or a name that is in {names}"
            raise BadSample("bad labels", f"{what}; got {str(said)[:40]!r}")
        if known and number >= len(known.names):
            raise BadSample("bad labels", f"{known.source} names {len(known.names):,} classes; got label {number}")
        return number if number == UNLABELLED or self._numbers is None else self._numbers[number]


def parse_classes(content: bytes, source: str) -> Classes:
    """Parse a list of classes: one name per line, or JSON with a list of names, {label: name} or {name: label}.

    ADE20K's table of classes, objectInfo150 with tabs or commas, is read too; its column Name has the names.

    Args:
        content: Content of the file.
        source: Name of the file, used in messages.

    Raises:
        DataError: If the content has another form.
    """
    try:
        text = content.decode("utf-8-sig").strip()
        found: Any = json.loads(text) if text[:1] in ("[", "{") else _lines(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{source}: is no list of classes ({str(error)[:100]}). Write one name a line, or JSON."
        ) from None
    if isinstance(found, dict):
        by_number = {str(label): name for name, label in found.items() if type(label) is int} or found
        found = [by_number.get(str(number)) for number in range(len(found))]
    if not isinstance(found, list) or not found or not all(isinstance(name, str) and name for name in found):
        raise DataError(
            f"{source}: is no list of classes. Write one name a line, or JSON: a list of names, or "
            '{"0": name, "1": name, ...}.'
        )
    return Classes(tuple(found), source)


def _lines(text: str) -> list[str]:
    """Return the names in a text with one name per line, or in the column Name of a table that begins with Idx."""
    lines = [line.strip() for line in text.splitlines()]
    separator = "\t" if "\t" in text else ","
    if not lines or (header := lines[0].split(separator))[0] != "Idx" or header[-1] != "Name":
        return lines
    return [row[-1].strip() for row in csv.reader(lines[1:], delimiter=separator)]


def read_classes(path: Path) -> Classes:
    """Read a list of classes from a file; see `parse_classes` for its form.

    Raises:
        DataError: If the file cannot be read, or is not a list of classes.
    """
    try:
        return parse_classes(read_file(path)[:_MOST_NAMES], str(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Give a file with one class a line.") from error


def _label_in(raw: dict[str, Any]) -> object:
    """Return the label as it stands in a sample, a number or a text; -1 if there is none."""
    try:
        if "cls" in raw:
            return raw["cls"].decode("utf-8-sig").strip()
        if "json" in raw:
            content = json.loads(raw["json"])
            said = content.get("label") if isinstance(content, dict) else None
            return UNLABELLED if said is None else said
    except (ValueError, RecursionError) as error:  # JSON or UTF-8
        raise BadSample("bad labels", str(error)[:100]) from None
    return UNLABELLED


def _as_number(said: object) -> int | None:
    if isinstance(said, int | float) and not isinstance(said, bool):
        said = str(said)
    if isinstance(said, str) and _NUMBER(said.strip()):
        return int(said.strip().partition(".")[0])
    return None


def _numbered(names: tuple[str, ...]) -> dict[str, int]:
    return {name: number for number, name in reversed(list(enumerate(names)))}  # of equal names the first counts


def _few(names: tuple[str, ...] | list[str]) -> str:
    return shown(few(names))
