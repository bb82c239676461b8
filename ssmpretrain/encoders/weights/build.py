"""Build the encoder that a file describes, after a check that the file has enough tensors for it.

A damaged or hostile file may describe a model with a billion blocks, or one that fits into no memory. The check is fast
and needs almost no memory.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.family import OTHER_WEIGHTS
from ssmpretrain.encoders.family_registry import Match
from ssmpretrain.encoders.registry import create_encoder
from ssmpretrain.encoders.weights.state_dict import CheckpointFile

_BLOCKS = ("depth", "depths", "decoder_depth", "layers")  # each block has at least one tensor
_MOST = {"img_size": 8192, "image_size": 8192, "vocab_size": 1 << 20}
_MOST_OF_ALL = 65_536
# A model may have more numbers than its file: a head, positions of larger images, further directions of ARM.
_SLACK, _FACTOR = 1 << 20, 4
_REMEDY = "The file is damaged or malicious. Download it again from a source that you trust."
_MAX_SHOWN = 200


@dataclass(frozen=True)
class BuiltEncoder:
    """Encoder with random weights, before it is filled from a file.

    Attributes:
        model: The encoder.
        args: Arguments of `create_encoder` that give the same encoder, including those of timm's wrapper.
        classes_in_file: Outputs of the head in the file; 0 if the file has no head.
        fresh: Names of the tensors that keep their random values: those of a head with another number of outputs.
        resize_to: Image size that an encoder of timm gets after it is filled; None if the size does not change.
        wrapper: timm's wrapper of the same encoder if the caller passed `features_only`, else None.
    """

    model: nn.Module
    args: dict[str, Any]
    classes_in_file: int
    fresh: frozenset[str]
    resize_to: Any
    wrapper: nn.Module | None


def build_for(match: Match, file: CheckpointFile, num_classes: int | None, wrapping: Mapping[str, Any]) -> BuiltEncoder:
    """Build the encoder for the weights in a file.

    An encoder of timm whose image size can change later is built for the image size in the file. All other encoders are
    built for the image size that the caller passed.

    Args:
        match: The encoder that was recognised in the file.
        file: The content of the file.
        num_classes: As in `load_encoder`.
        wrapping: Arguments of timm's wrapper, such as `features_only`.

    Raises:
        ValueError: If the encoder cannot be built, or if it is much larger than the content of the file.
    """
    if file.name is not None:  # raise an error if the file has too few tensors
        if not timm.is_model(file.name):
            raise UserError(
                f"checkpoint: {file.path} says that its encoder is {file.name}, and no package registers that name. "
                "Import the module that registers it first. Commands find it if its package has "
                "an entry point of the group ssmpretrain.encoders."
            )
        said, sizes = file.name, {k: v for k, v in file.args.items() if k not in ("num_classes", *OTHER_WEIGHTS)}
        statement = f"its encoder is {said}"
        check_described(statement, sizes, file.state, file.path, lambda: create_encoder(said, num_classes=0, **sizes))
    name, family = match.name, match.family
    config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    classifier: Any = (config and config.classifier) or "head"
    classifier = classifier[0] if isinstance(classifier, tuple) else classifier  # the first of two heads
    weight = match.state.get(f"{classifier}.weight")
    classes_in_file = 0 if weight is None else weight.shape[0]
    args = {**match.args, "num_classes": classes_in_file if num_classes is None else num_classes}
    in_file = {"img_size": file.args.get("img_size")} if "img_size" in args and file.name is not None else {}
    model = create_encoder(name, **args | in_file)
    resized_later = hasattr(model, "set_input_size") and not family.resizes_positions
    if in_file and not resized_later:
        model = create_encoder(name, **args)
    resize_to = args.get("img_size") if resized_later else None
    fresh: frozenset[str] = frozenset()
    if args["num_classes"] != classes_in_file:
        with torch.device("meta"):
            counterpart = create_encoder(name, **{**args, "num_classes": 0 if args["num_classes"] else 1})
        head = model.state_dict().keys() ^ counterpart.state_dict().keys()
        # The norm of pooled features starts fresh too if the encoder in the file had no pooling, as after MAE.
        norm = {key for key in model.state_dict() if key.startswith(family.pooled_norm) and key not in match.state}
        fresh = frozenset(head | norm)
    if not wrapping.get("features_only"):
        return BuiltEncoder(model, args, classes_in_file, fresh, resize_to, None)
    args |= wrapping
    return BuiltEncoder(model, args, classes_in_file, fresh, resize_to, create_encoder(name, **args))


def check_described(
    what: str, settings: Mapping[str, Any], tensors: Mapping[str, Any], path: str | Path, build: Callable[[], nn.Module]
) -> None:
    """Check that a model described in a file can be built and is not much larger than the content of the file.

    Args:
        what: Description in the file, such as "its encoder is vim_tiny_patch16_224", used in error messages.
        settings: Arguments that decide on sizes.
        tensors: Content of the file by name.
        path: Path of the file, used in error messages.
        build: Function that builds the model. It is called on the meta device.

    Raises:
        ValueError: If the model cannot be built, or if it is much larger than the content of the file.
    """
    held = [tensor for tensor in tensors.values() if isinstance(tensor, Tensor)]
    _check_sizes(settings, len(held), path)
    try:
        with torch.device("meta"):
            model = build()
    except Exception as error:  # this package, timm and torch raise different errors here
        raise UserError(
            f"checkpoint: {path} says that {what} and how it was built, and so it cannot be built "
            f"({_first_line(error)}). Load it with the version that wrote it, or fetch it again."
        ) from error
    asked = sum(tensor.numel() for tensor in model.state_dict().values())
    numbers = sum(tensor.numel() for tensor in held)
    if asked > _FACTOR * numbers + _SLACK:
        raise UserError(f"checkpoint: {path} says that {what}, of {asked:,} numbers, and holds {numbers:,}. {_REMEDY}")


def _check_sizes(value: Any, blocks: int, path: str | Path, key: str = "") -> None:
    """Raise an error if a number of blocks is above the number of tensors, or another size above its limit."""
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
    name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return f"{name}{error}".splitlines()[0][:_MAX_SHOWN]
