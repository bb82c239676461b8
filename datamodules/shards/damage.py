"""Damaged shards at the start of a run: how much of them can be used, and when the run must stop."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ssmpretrain.base.errors import DataError, SourceError
from ssmpretrain.datamodules.faults.bad_samples import too_many
from ssmpretrain.datamodules.files.patience import BRIEF, patiently
from ssmpretrain.datamodules.shards.location import Location
from ssmpretrain.datamodules.tar.index import ShardIndex, index_path, read_index
from ssmpretrain.datamodules.tar.walk import walk_tar

_log = logging.getLogger(__name__)
_SHOWN = 5  # number of damaged shards that a message lists


@dataclass(frozen=True)
class Damage:
    """Damage of a shard that can be used in part.

    Args:
        cause: Phrase under which the damage is counted.
        text: Sentence that begins with the name of the shard.
        lost: Number of samples that the index of the shard lists but the shard lacks. They stay in the plan, and are
            counted when training reads them. None if the number is not known; then the shard counts as one fault.
    """

    cause: str
    text: str
    lost: int | None


def keep_usable(
    shards: Sequence[Location], found: Sequence[ShardIndex | DataError], max_fraction: float, where: str
) -> tuple[list[ShardIndex], dict[Path, Damage]]:
    """Return the indexes of the usable shards, and the damage of shards that can be used in part.

    A truncated shard whose index lists its samples is planned as if it were whole. Of other damaged shards, the samples
    that can be found are used.

    Args:
        shards: All shards, in order.
        found: Results of `load_indexes`, in the same order.
        max_fraction: Fraction of all samples that may be lost.
        where: Name of the data module and split, which opens every message.

    Raises:
        DataError: If too many samples are lost, or a shard has no usable sample.
    """
    kept: list[ShardIndex] = []
    damaged: dict[Path, Damage] = {}
    useless: list[str] = []
    without_index: list[str] = []
    for shard, index in zip(shards, found, strict=True):
        if isinstance(index, ShardIndex):
            kept.append(index)
        elif not isinstance(shard, Path):  # a shard from a server was fetched again, and is still damaged
            useless.append(str(index))
        elif isinstance(index, SourceError):
            useless.append(f"{index} Make it readable, or leave it out.")
        elif isinstance(closer := _look_closer(shard), str):
            useless.append(closer)
        else:
            index, damage = closer
            kept.append(index)
            if isinstance(damage, Damage):
                damaged[shard] = damage
            else:
                without_index.append(damage)
    if useless:
        others = (
            f" ({len(useless) - 1:,} more of the {len(shards):,} shards cannot be used either.)" if useless[1:] else ""
        )
        raise DataError(f"{where}: {useless[0]}{others}")
    if without_index:
        _log.warning(
            "%s: %s. The shards are whole, and are read without an index. Write the indexes again with "
            "`ssmpretrain shards index`.",
            where,
            _listed(without_index),
        )
    if damaged:
        _judge(kept, damaged, max_fraction, where)
    return kept, damaged


def _look_closer(shard: Path) -> tuple[ShardIndex, Damage | str] | str:
    """Examine a damaged shard.

    Returns:
        The index of its usable part with the damage, or with the flaw of its index file if the tar is whole; or a
        message that says why nothing can be used.
    """
    try:
        stat, walked = patiently(shard, lambda: (shard.stat(), walk_tar(shard)), BRIEF)
    except SourceError as error:
        return f"{error} Make it readable, or leave it out."
    if not len(walked.offsets):
        return f"{shard}: {walked.damage or 'holds no image, and is not what its index describes. Fetch it again.'}"
    with suppress(DataError, OSError):
        index, layout = read_index(index_path(shard), shard)
        ends = np.append(layout.offsets[1:], index.bytes)
        lost = int((ends > stat.st_size).sum())
        if walked.damage and 0 < lost < index.samples and np.isin(walked.offsets, layout.offsets).all():
            text = f"{shard.name} is truncated: {lost:,} of its {index.samples:,} samples are lost"
            return replace(index, mtime_ns=stat.st_mtime_ns), Damage("truncated shards", text, lost)
    index = ShardIndex(shard, len(walked.offsets), stat.st_size, walked.extensions, mtime_ns=stat.st_mtime_ns)
    if walked.damage:
        cause = "truncated shards" if walked.damage.startswith("is truncated") else "damaged shards"
        return index, Damage(cause, f"{shard.name} {walked.damage.partition(' (')[0]}", None)
    if flaw := _flaw_of_index(shard):
        return index, flaw
    return index, Damage("stale indexes", f"{shard.name} is not the file that its index describes", None)


def _flaw_of_index(shard: Path) -> str:
    """Return a phrase that says why the index beside a shard cannot be used; empty if it can, or if there is none."""
    path = index_path(shard)
    try:
        if path.exists():
            read_index(path)
    except DataError as error:
        return f"{path.name}, the index of {shard.name}, {str(error).removeprefix(f'{path}: ').partition('. ')[0]}"
    except OSError as error:
        return f"{path.name}, the index of {shard.name}, cannot be read ({error.strerror})"
    return ""


def _judge(kept: Sequence[ShardIndex], damaged: dict[Path, Damage], max_fraction: float, where: str) -> None:
    """Warn about damaged shards, and raise if too many samples are lost."""
    texts = [damage.text for damage in damaged.values()]
    verb = "is" if len(texts) == 1 else "are"
    said = f"{where}: {len(texts):,} of {len(kept):,} shards {verb} damaged: {_listed(texts)}."
    lost = sum(1 if damage.lost is None else damage.lost for damage in damaged.values())
    samples = sum(index.samples for index in kept)
    if too_many(lost, samples, max_fraction):
        raise DataError(
            f"{said} At least {lost:,} of {samples:,} samples are lost, more than {max_fraction:.2%}. "
            "Fetch the shards again, leave them out, or raise max_bad_fraction."
        )
    _log.warning("%s What is left of them is used. Fetch them again.", said)


def _listed(texts: Sequence[str]) -> str:
    more = f"; and {len(texts) - _SHOWN:,} more" if len(texts) > _SHOWN else ""
    return "; ".join(texts[:_SHOWN]) + more
