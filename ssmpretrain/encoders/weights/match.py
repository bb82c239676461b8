"""Match a checkpoint with an encoder: by what the file says, or else by the names and shapes of its tensors."""

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ssmpretrain.encoders.family import UNKNOWN, Family, families, family_named
from ssmpretrain.encoders.weights.reading import CheckpointFile

_MAX_LISTED = 5
# What to do for want of smaller patches.
FINER_GRID = "for more tokens of the same patches a larger img_size or, of a Vim, a smaller stride"
# Arguments with which timm fetches other weights; a run may have begun with them.
OTHER_WEIGHTS = ("pretrained", "checkpoint_path")


def match_encoder(
    file: CheckpointFile, name: str | None, asked: dict[str, Any]
) -> tuple[CheckpointFile, str, dict[str, Any]]:
    """Find the name and the arguments of the encoder in a file.

    Args:
        file: The file.
        name: The encoder's registered name if the caller knows it.
        asked: Arguments of the encoder that the caller asks for.

    Returns:
        The file, its tensors under the names of the encoder; the name; the arguments.

    Raises:
        ValueError: If the encoder is not recognised, or the request contradicts the file.
    """
    if file.name is not None:
        built_with: dict[str, Any] | None = {k: value for k, value in file.args.items() if k not in OTHER_WEIGHTS}
        if name not in (None, file.name):
            built_with = _under_name(str(name), file.name, file.args)
        if built_with is not None:
            return file, name or file.name, {**built_with, **asked}
    family = _family_like(file) if name is None else family_named(name)
    if family is UNKNOWN:
        return file, str(name), dict(asked)  # one of timm's own: filling it will list what the file lacks
    _refuse_strangers(file, [family])
    file = replace(file, state=family.current_names(file.state, file.path, asked))
    found = family.recognise(file.state)
    if found is None:
        if name is not None:
            return file, name, dict(asked)  # likewise
        raise _unrecognised(file, family.title)
    if name is None and family.depth not in asked:
        _refuse_cut_off(file, family, found)
    base = name or family.variant_name(found) or next(iter(family.variants))
    wanted = asked if name is None else {**family.sizes(name), **family.implied, **asked}
    _refuse_contradictions(file, family, found, wanted, base)
    layout = family.layout(file.path, file.state, found, wanted, named=name is not None)
    return file, base, {**found, **layout, **asked}


def _under_name(name: str, other: str, args: dict[str, Any]) -> dict[str, Any] | None:
    """Return the arguments in a file that says the name `other`, for another name; None if that has another size."""
    family = family_named(name)
    if family is UNKNOWN or family is not family_named(other):
        return None
    return family.args_under_name(name, other, {key: value for key, value in args.items() if key not in OTHER_WEIGHTS})


def _family_like(file: CheckpointFile) -> Family:
    """Return the family that the tensors of a file look like."""
    found = next((family for family in families() if family.looks_like(file.state)), None)
    if found is None:
        _refuse_strangers(file, families())
        raise _unrecognised(file, " or ".join(family.title for family in reversed(families()) if family.variants))
    return found


def _refuse_strangers(file: CheckpointFile, candidates: Iterable[Family]) -> None:
    """Raise a ValueError that names the architecture if a tensor belongs to another one than the candidates."""
    for family in candidates:
        for pattern, meaning in family.strangers.items():
            if key := next((key for key in file.state if re.search(pattern, key)), None):
                raise ValueError(
                    f"load_encoder: {file.path.name} is not a {family.title} of this package: {key} means {meaning}."
                )


def _unrecognised(file: CheckpointFile, titles: str) -> ValueError:
    some = ", ".join(list(file.state)[:_MAX_LISTED])
    return ValueError(
        f"load_encoder: {file.path} is no {titles} checkpoint, or too little of one to recognise; "
        f"its {len(file.state)} tensors start with {some}. Pass `name` to see what it lacks."
    )


def _refuse_cut_off(file: CheckpointFile, family: Family, found: dict[str, Any]) -> None:
    """A registered width at an unknown depth is more likely a file that lost its last blocks than a size of its own."""
    same_but_depth = [
        name
        for name, variant in family.variants.items()
        if all(found.get(key, value) == value for key, value in variant.items() if key not in (family.depth, "stride"))
    ]
    depth = found[family.depth]
    if same_but_depth and depth not in [family.variants[name][family.depth] for name in same_but_depth]:
        whole = family.variants[same_but_depth[0]][family.depth]
        raise ValueError(
            f"load_encoder: {file.path} holds {depth} blocks of {found['embed_dim']} channels; "
            f"{same_but_depth[0]} has {whole}. If blocks were left out on purpose, pass {family.depth}={depth}."
        )


def _refuse_contradictions(
    file: CheckpointFile, family: Family, found: dict[str, Any], asked: dict[str, Any], base: str
) -> None:
    for key, value in found.items():
        if key in ("stride", "img_size", "in_chans") or key not in asked or _plain(asked[key]) == value:
            continue
        if {_plain(asked[key]), value} <= family.untraceable.get(key, set()):
            continue
        name = family.variant_name(found)
        remedy = f"Pass name={name!r} or leave `name` out" if name and name != base else f"Pass {key}={value!r}"
        remedy += f", or {FINER_GRID}" if key == "patch_size" else ""
        raise ValueError(
            f"load_encoder: {file.path} holds {family.describe(found)} with {key}={value!r}; "
            f"{base} with {key}={asked[key]!r} was asked for. {remedy}."
        )


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
