"""Registry of families: find the family of a name, of an encoder or of a checkpoint."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ssmpretrain.base.environment import entry_points_of, package_of
from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.family import OTHER_WEIGHTS, Family, unrecognised

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Match:
    """Encoder that was recognised in a checkpoint.

    Attributes:
        family: Family of the encoder.
        name: Registered name of the encoder.
        args: Arguments of `create_encoder`: those in the file, and those that the caller asked for.
        state: Tensors by the names of the encoder's own state dict.
        built_with: Arguments of the encoder that the file records; None if the file records none.
    """

    family: Family
    name: str
    args: dict[str, Any]
    state: dict[str, Tensor]
    built_with: dict[str, Any] | None = None


class _Unknown(Family):
    """Family of all encoders without a registered family, such as most of timm's encoders."""

    def match(
        self, path: Path, state: Mapping[str, Tensor], name: str | None, asked: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
        if name is not None:
            return dict(state), name, dict(asked)  # `fill` will list the missing tensors
        for family in _registered:
            family.refuse_strangers(path, state)
        *others, last = (family.title for family in reversed(_registered) if family.variants)
        titles = f"{', '.join(others)} or {last}" if others else last
        raise unrecognised(path, state, titles)


UNKNOWN = _Unknown()
_registered: list[Family] = []


def register_family(family: Family) -> Family:
    """Register a family, so that loading, masking, pooling and exporting can find it, and return it.

    If a class of the same module and name is registered already, as after a second run of a notebook cell, the new one
    replaces it.

    Args:
        family: The family.

    Returns:
        The same family.

    Raises:
        ValueError: If one of its names already belongs to another family.
    """
    if not isinstance(family, Family):
        raise UserError(f"register_family: family is an object of a subclass of Family; got {family!r}. Create one.")
    former = [one for one in _registered if _defined_at(one) == _defined_at(family)]
    for other in (one for one in _registered if one not in former):
        if taken := sorted({*family.names} & {*other.names}):
            raise UserError(
                f"register_family: a registered name belongs to one family; {', '.join(taken)} of {family.title} "
                f"belong to {other.title}. Choose other names."
            )
    _registered[:] = [family, *(one for one in _registered if one not in former)]
    return family


def _defined_at(family: Family) -> tuple[str, str]:
    return type(family).__module__, type(family).__qualname__


def families() -> tuple[Family, ...]:
    """Return all registered families, the last registered one first."""
    return tuple(_registered)


@cache
def import_added_families() -> None:
    """Import the modules of other installed packages that register encoders, once in a process.

    A package names such a module by an entry point of the group `ssmpretrain.encoders`. One that cannot be imported is
    named in a warning.
    """
    for point in entry_points_of("ssmpretrain.encoders"):
        try:
            point.load()
        except Exception as error:
            _log.warning(
                "%s: its encoders are not available, because the entry point %s = %s cannot be imported (%s: %s). "
                "Correct or uninstall the package.",
                *(package_of(point), point.name, point.value, type(error).__name__, error),
            )


def family_of(encoder: nn.Module) -> Family:
    """Return the family of an encoder; `UNKNOWN` if its class belongs to no registered family."""
    return next((family for family in _registered if isinstance(encoder, family.classes)), UNKNOWN)


def family_named(name: str | None) -> Family:
    """Return the family that a registered name belongs to; `UNKNOWN` if there is none, or if the name is None."""
    return next((family for family in _registered if name in family.names), UNKNOWN)


def choices(able: Callable[[Family], bool]) -> str:
    """Return a list, as text for messages, of the families that pass a test, with the patterns of their names.

    Args:
        able: The test.

    Returns:
        This package's families first, then those of timm's encoders, joined by commas.
    """
    known = [family for family in reversed(_registered) if able(family)]
    ours, timms = (
        [f"{family.title} ({', '.join(family.names_like)})" for family in known if family.is_timms == wanted]
        for wanted in (False, True)
    )
    if not timms:
        return ", ".join(ours)
    return ", ".join([*ours, f"and timm's {timms[0]}", *timms[1:]])


def match_encoder(
    path: Path,
    state: dict[str, Tensor],
    said: tuple[str, Mapping[str, Any]] | None,
    name: str | None,
    asked: Mapping[str, Any],
) -> Match:
    """Find the encoder in a checkpoint from its metadata, or else from names and shapes of its tensors.

    Args:
        path: Path of the file, used in error messages.
        state: Tensors of the file, without prefixes of wrappers.
        said: Name and arguments of the encoder in the file's metadata; None if the file has no such metadata.
        name: Registered name of the encoder; None if the caller does not know it.
        asked: Arguments of the encoder that the caller passed.

    Returns:
        The recognised encoder.

    Raises:
        ValueError: If the encoder is not recognised, or if the caller's name or arguments contradict the file.
    """
    built_with = None
    if (named := name or (said[0] if said else None)) and family_named(named) is UNKNOWN:
        import_added_families()
    if said is not None:
        in_file, held = said[0], {key: value for key, value in said[1].items() if key not in OTHER_WEIGHTS}
        family = family_named(name or in_file)
        built_with = {**family_named(in_file).sizes(in_file), **said[1]}
        args: dict[str, Any] | None = held
        if name not in (None, in_file):
            known = family is not UNKNOWN and family is family_named(in_file)
            args = family.args_under_name(str(name), in_file, held) if known else None
        if args is not None:
            return Match(family, name or in_file, {**args, **asked}, family.from_official(state), built_with)
    family = _family_like(state) if name is None else family_named(name)
    state, found, args = family.match(path, state, name, asked)
    return Match(family, found, args, state, built_with)


def _family_like(state: Mapping[str, Tensor]) -> Family:
    """Return the first family whose `looks_like` accepts the tensors; `UNKNOWN` if there is none."""
    if (found := _first_like(state)) is None:
        import_added_families()
        found = _first_like(state)
    return found or UNKNOWN


def _first_like(state: Mapping[str, Tensor]) -> Family | None:
    return next((family for family in _registered if _accepts(family, state)), None)


def _accepts(family: Family, state: Mapping[str, Tensor]) -> bool:
    try:
        return family.looks_like(state)
    except Exception as error:  # another package's code may raise anything
        raise UserError(
            f"load_encoder: looks_like of the family {family.title} ({type(family).__module__}) tells whether tensors "
            f"are its own; got {type(error).__name__}: {error}. Correct it, or give the encoder's name."
        ) from error
