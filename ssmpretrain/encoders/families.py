"""Registered families, and the one that a name, an encoder or a checkpoint belongs to."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.family import OTHER_WEIGHTS, Family, unrecognised


@dataclass(frozen=True)
class Match:
    """The encoder in a checkpoint.

    Attributes:
        family: Its family.
        name: Its registered name.
        args: Arguments that build it as the caller asks for it.
        state: Its tensors under its own names.
        built_with: Arguments with which the file says that it was built; None if it does not say.
    """

    family: Family
    name: str
    args: dict[str, Any]
    state: dict[str, Tensor]
    built_with: dict[str, Any] | None = None


class _Unknown(Family):
    """Family of the encoders that nobody has described, most of timm's among them."""

    def match(
        self, path: Path, state: Mapping[str, Tensor], name: str | None, asked: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
        if name is not None:
            return dict(state), name, dict(asked)  # filling the encoder will list what the file lacks
        for family in _registered:
            family.refuse_strangers(path, state)
        titles = " or ".join(family.title for family in reversed(_registered) if family.variants)
        raise unrecognised(path, state, titles)


UNKNOWN = _Unknown()
_registered: list[Family] = []


def register_family(family: Family) -> Family:
    """Make a family known to everything that reads, fills, masks, pools and exports encoders, and return it.

    A class that is defined anew, as in a notebook, takes the place of the former one.

    Raises:
        ValueError: If a name of it belongs to another family already.
    """
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
    """Return all families, the last registered first."""
    return tuple(_registered)


def family_of(encoder: nn.Module) -> Family:
    """Return the family of an encoder; `UNKNOWN` if no family describes its class."""
    return next((family for family in _registered if isinstance(encoder, family.classes)), UNKNOWN)


def family_named(name: str | None) -> Family:
    """Return the family of a registered name; `UNKNOWN` for the names of timm's own encoders."""
    return next((family for family in _registered if name in family.names), UNKNOWN)


def choices(able: Callable[[Family], bool]) -> str:
    """List the families that pass a test, with their names, for messages: this package's first, then timm's."""
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
    """Find the encoder in a checkpoint: by what the file says, or else by names and shapes of its tensors.

    Args:
        path: The file, for messages.
        state: Its tensors, wrappers' prefixes removed.
        said: Name and arguments in the file; None if it does not say.
        name: Registered name if the caller knows it.
        asked: Arguments of the encoder that the caller named.

    Raises:
        ValueError: If the encoder is not recognised, or the request contradicts the file.
    """
    built_with = None
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
    """Return the family that tensors look like."""
    return next((family for family in _registered if family.looks_like(state)), UNKNOWN)
