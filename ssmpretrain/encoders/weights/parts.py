"""A checkpoint in parts: a folder with one file of each rank, for models that no single process should hold.

Part 0 has everything but the tensors that lie in shards, and in the place of each of those its key; every part has its
rows of them. The parts are read like every other checkpoint, as tensors and plain data, by any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmpretrain.base.errors import UserError

_SHARDS = "rows in the parts"  # the only entry of what stands for a tensor that lies in shards


def part_path(folder: str | Path, rank: int, world: int) -> Path:
    """The file of one rank."""
    return Path(folder) / f"part-{rank:05d}-of-{world:05d}.ckpt"


def is_parts(path: str | Path) -> bool:
    """Whether a path is a checkpoint in parts."""
    return any(Path(path).glob("part-00000-of-*.ckpt"))


def parts_in(folder: str | Path) -> list[Path]:
    """The files, in the order of the ranks.

    Raises:
        ValueError: If one is missing, or there is none.
    """
    first = min(Path(folder).glob("part-00000-of-*.ckpt"), default=None)
    if first is None:
        raise UserError(f"checkpoint: {folder} is a folder without part-00000 of a checkpoint.")
    paths = [part_path(folder, rank, world) for world in [int(first.stem.rsplit("-", 1)[1])] for rank in range(world)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"checkpoint: {folder} lacks {len(missing)} of {len(paths)} parts, first {missing[0]}.")
    return paths


def rest_of(folder: str | Path, read: Callable[[Path], Any]) -> Any:
    """The checkpoint without the tensors that lie in shards; their names are there."""
    return read(parts_in(folder)[0])["rest"]


def part_of(checkpoint: dict[str, Any], rank: int, rows_of: Callable[[Any], Tensor | None]) -> dict[str, Any]:
    """What the file of `rank` holds.

    Args:
        checkpoint: The whole, on every rank of the same form.
        rank: This rank.
        rows_of: This rank's rows of a tensor that lies in shards, by dimension 0 in the order of the ranks; None of
            anything else.
    """
    shards: dict[str, Tensor] = {}

    def without_shards(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {name: without_shards(inner, f"{key}/{name}") for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)([without_shards(inner, f"{key}/{i}") for i, inner in enumerate(value)])
        rows = rows_of(value)
        if rows is None:
            return value
        shards[key] = rows
        return {_SHARDS: key}

    rest = without_shards(checkpoint, "")
    return {"shards": shards, "rest": rest if rank == 0 else None}


def read_parts(
    folder: str | Path, read: Callable[[Path], Any], take: Callable[[str, Tensor], Tensor] | None = None
) -> dict[str, Any]:
    """The whole checkpoint.

    Args:
        folder: Of the parts.
        read: Reads one file.
        take: Called with the name and the whole of every tensor that lay in shards, as it is put together; what it
            returns is kept, so that no more than one of them is ever whole.

    Raises:
        ValueError: If a part is missing.
    """
    parts = [read(path) for path in parts_in(folder)]

    def whole(value: Any, name: str) -> Any:
        if isinstance(value, dict):
            if value.keys() == {_SHARDS}:
                tensor = torch.cat([part["shards"][value[_SHARDS]] for part in parts])
                return tensor if take is None else take(name, tensor)
            return {key: whole(inner, key) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)([whole(inner, name) for inner in value])
        return value

    result: dict[str, Any] = whole(parts[0]["rest"], "")
    return result
