"""Captions of a raw sample: the fields that hold them, and the faults that make a caption unusable."""

import json
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules.faults.bad_samples import BadSample

MISSING = "samples without a caption"
EMPTY = "empty captions"
NOT_UTF8 = "captions that are not UTF-8"
BAD = "bad captions"
GIANT = "giant captions"

_MOST_CHARACTERS = 1_000_000  # a tokenizer takes seconds for a longer text, and no model reads so much
_WHITE = "\t\n\v\f\r\x85"  # control characters that separate words
_CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in _WHITE}
_CONTROL_BYTES = bytes(code for code in range(32) if chr(code) not in _WHITE)


class _Field(NamedTuple):
    """Place of a caption: the extension of a member of the sample, and for JSON the names of the nested fields."""

    member: str
    path: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ".".join((self.member, *self.path))


class Captions:
    """Read the captions of samples.

    Args:
        caption: Place of the captions. An extension such as "txt" or "caption.txt" takes the whole text of this member.
            "json.FIELD" takes a string or a list of strings from a JSON object, "json.a.b" from an object inside it,
            and "json" the whole JSON value. A list of places takes the captions of all places that a sample has.
        where: Name of the class or command, which opens the message of an error.

    Raises:
        DataError: If `caption` names no place.
    """

    def __init__(self, caption: str | Sequence[str], where: str) -> None:
        names = [caption] if isinstance(caption, str) else list(caption)
        if not names or not all(isinstance(name, str) and all(name.split(".")) for name in names):
            raise DataError(
                f"{where}: caption is an extension, json.FIELD or a list of these; got {caption!r}. "
                "Use txt, json.caption or [txt, json.caption], say."
            )
        self._fields = [_parse(name) for name in names]

    def __str__(self) -> str:
        return " or ".join(map(str, self._fields))

    @property
    def members(self) -> set[str]:
        """Extensions of the members that can hold captions."""
        return {field.member for field in self._fields}

    def of(self, raw: dict[str, Any]) -> list[str]:
        """Return the usable captions of a sample, in order, at least one.

        Raises:
            BadSample: If the sample has no usable caption.
        """
        usable, faults = self.sort(raw)
        if not usable:
            raise faults[0]
        return usable

    def sort(self, raw: dict[str, Any]) -> tuple[list[str], list[BadSample]]:
        """Return the usable captions of a sample, in order, and the faults of the other captions.

        At least one of the two lists is not empty. A missing field is a fault only if the sample has none of the
        fields.
        """
        usable: list[str] = []
        faults: list[BadSample] = []
        for field in self._fields:
            try:
                for text in _texts(raw, field):
                    try:
                        usable.append(_cleaned(text, field))
                    except BadSample as fault:
                        faults.append(fault)
            except BadSample as fault:
                faults.append(fault)
        told = [fault for fault in faults if fault.cause != MISSING]
        return usable, told if usable or told else faults[:1]


def _parse(name: str) -> _Field:
    """Split a name after its first part "json", into the member, in lower case as in webdataset, and nested names."""
    parts = name.split(".")
    lower = [part.lower() for part in parts]
    end = lower.index("json") + 1 if "json" in lower else len(parts)
    return _Field(".".join(lower[:end]), tuple(parts[end:]))


def _texts(raw: dict[str, Any], field: _Field) -> Iterator[object]:
    """Yield the texts that a field of a sample holds."""
    if field.member not in raw:
        fields = ", ".join(sorted(name for name in raw if not name.startswith("__")))
        raise BadSample(MISSING, f"no {field.member}; fields: {fields or 'none'}")
    text = _decoded(raw[field.member], field.member)
    if not field.member.endswith("json"):
        yield text
        return
    found = _followed(_from_json(text, field.member), field)
    if found is None or found == []:
        raise BadSample(MISSING, f"{field} is {json.dumps(found)}")
    yield from found if isinstance(found, list) else [found]


def _decoded(content: bytes, member: str) -> str:
    if _is_utf16(content):
        raise BadSample(NOT_UTF8, f"{member}: every second byte is a control character, as in UTF-16")
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise BadSample(NOT_UTF8, f"{member}: byte {error.start:,} is 0x{content[error.start]:02x}") from None


def _is_utf16(content: bytes) -> bool:
    """Return whether bytes look like UTF-16: every second byte is a control character.

    Some texts in UTF-16, for example in Russian or Thai, are also valid UTF-8.
    """
    halves = [not half.translate(None, _CONTROL_BYTES) for half in (content[::2], content[1::2])]
    return len(content) >= 4 and len(content) % 2 == 0 and halves.count(True) == 1


def _from_json(text: str, member: str) -> object:
    try:
        content: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSample(BAD, f"{member}: {str(error)[:100]}") from None
    return content


def _followed(content: object, field: _Field) -> object:
    """Return the value in a JSON object that the nested names of a field lead to."""
    for name in field.path:
        if not isinstance(content, dict):
            raise BadSample(BAD, f"{field}: expected an object with {name!r}; got {_shown(content)}")
        if name not in content:
            raise BadSample(MISSING, f"no {name!r} for {field}; it has: {', '.join(map(str, content)) or 'nothing'}")
        content = content[name]
    return content


def _cleaned(text: object, field: _Field) -> str:
    """Remove white space at both ends of a caption, a byte-order mark and control characters; keep everything else."""
    if not isinstance(text, str):
        raise BadSample(BAD, f"{field}: expected a string; got {_shown(text)}")
    if len(text) > _MOST_CHARACTERS:
        raise BadSample(GIANT, f"{field}: {len(text):,} characters")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise BadSample(NOT_UTF8, f"{field}: half a surrogate pair")
    cleaned = text.lstrip("\ufeff").translate(_CONTROL).strip()
    if all(unicodedata.category(letter) == "Cf" for letter in cleaned):  # empty, or only zero-width characters
        raise BadSample(EMPTY, str(field))
    return cleaned


def _shown(value: object) -> str:
    return json.dumps(value)[:40]
