"""Check what a file says of its model against the tensors that it holds, before anything is built from it.

A header costs nothing to write: one that asks for a billion blocks, or for a width that no memory holds, is damaged or
hostile. Everything here is quick and needs no memory.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.registry import create_encoder
from ssmpretrain.encoders.weights.variant import OTHER_WEIGHTS

_BLOCKS = ("depth", "depths", "decoder_depth", "layers")  # each block has a tensor
_MOST = {"img_size": 8192, "image_size": 8192, "vocab_size": 1 << 20}
_MOST_OF_ALL = 65_536
# Numbers that a model may have and its file has not: heads, positions for larger images, ARM's other directions.
_SLACK, _FACTOR = 1 << 20, 4
_REMEDY = "The file is damaged, or meant to do harm. Fetch it again from a source that you trust."
_MAX_SHOWN = 200


def check_described_encoder(name: str, args: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse an encoder that the file's tensors could not fill.

    Args:
        name, args: What the file says that it was built with.
        tensors: What the file holds.
        path: The file, for messages.

    Raises:
        ValueError: If it cannot be built, or is far larger than what the file holds.
    """
    args = {key: value for key, value in args.items() if key not in ("num_classes", *OTHER_WEIGHTS)}
    check_described(f"its encoder is {name}", args, tensors, path, lambda: create_encoder(name, num_classes=0, **args))


def check_described(
    what: str, settings: Mapping[str, Any], tensors: Mapping[str, Any], path: str | Path, build: Callable[[], nn.Module]
) -> None:
    """Refuse a model that the file's tensors could not fill; arguments and errors as `check_described_encoder`.

    Args:
        what: What the file says, in words.
        settings: Those that decide on sizes.
        tensors: What the file holds.
        path: The file.
        build: Builds the model.
    """
    held = [tensor for tensor in tensors.values() if isinstance(tensor, Tensor)]
    _check_sizes(settings, len(held), path)
    try:
        with torch.device("meta"):
            model = build()
    except Exception as error:  # of this package, timm or torch, by where the wrong kind strikes
        raise UserError(
            f"checkpoint: {path} says that {what} and how it was built, and so it cannot be built "
            f"({_first_line(error)}). Load it with the version that wrote it, or fetch it again."
        ) from error
    asked = sum(tensor.numel() for tensor in model.state_dict().values())
    numbers = sum(tensor.numel() for tensor in held)
    if asked > _FACTOR * numbers + _SLACK:
        raise UserError(f"checkpoint: {path} says that {what}, of {asked:,} numbers, and holds {numbers:,}. {_REMEDY}")


def _check_sizes(value: Any, blocks: int, path: str | Path, key: str = "") -> None:
    """Refuse counts that are out of all proportion: of blocks more than there are tensors, of others whatever."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _check_sizes(inner, blocks, path, str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_sizes(inner, blocks, path, key)
    elif isinstance(value, int):
        most = blocks if key in _BLOCKS else _MOST.get(key, _MOST_OF_ALL)
        if value > most:
            of_what = "the number of tensors in the file, " if key in _BLOCKS else ""
            raise UserError(f"checkpoint: {key} is at most {of_what}{most:,}; {path} says {value:.6g}. {_REMEDY}")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:_MAX_SHOWN]
