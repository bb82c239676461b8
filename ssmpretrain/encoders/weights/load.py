"""Encoders from checkpoint files: published weights, our own runs, exported files."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.models import get_model_input_config
from torch import nn

from ssmpretrain.encoders.registry import create_encoder
from ssmpretrain.encoders.sequence.encoder import SequenceEncoder, to_height_width
from ssmpretrain.encoders.weights.description import check_described_encoder
from ssmpretrain.encoders.weights.fill import LoadReport, fill, resized_note
from ssmpretrain.encoders.weights.preprocessing import remember_images
from ssmpretrain.encoders.weights.reading import CheckpointFile, read_checkpoint
from ssmpretrain.encoders.weights.variant import name_and_args

_logger = logging.getLogger(__name__)

# Arguments that make timm wrap the encoder.
_OF_THE_WRAPPER = ("features_only", "out_indices", "feature_cls")


def load_encoder(
    path: str | Path,
    name: str | None = None,
    num_classes: int | None = None,
    *,
    ema: bool | None = None,
    keep_dtypes: bool = False,
    **encoder_args: Any,
) -> nn.Module:
    """Build the encoder that a checkpoint holds and fill it, or fail: no encoder comes back with a tensor left at
    random but for a head that was asked for, the norm of pooled features before it, and ARM's class token.

    Reads the published `.pth` files of Vim, VMamba and ARM, this package's training checkpoints and everything that
    `save_encoder` writes. Code in a file is never run.

    An ARM encoder comes back with four directions, as it is fine-tuned. Where the file holds one, as pretraining leaves
    it, the others start as copies of that and the class token starts fresh; `directions=1` gives the encoder as it was
    pretrained.

    Args:
        path: The file; or the folder of a run, for its last checkpoint, or one that `save_encoder` wrote for timm.
        name: The encoder's registered name; None recognises it from what the file says or from the tensors' shapes.
        num_classes: None keeps the head that the file has, so that the encoder gives logits; without one it gives
            pooled features. 0 drops the head. A number loads the file's head if that has as many classes and makes a
            fresh one if not.
        ema: True takes the moving average of the weights, False the weights that were trained, None what the file
            calls its model.
        keep_dtypes: Keep the file's dtypes where they are others than the encoder's float32: to write the tensors on
            as they are, not to compute with them.
        encoder_args: Further arguments of the encoder, such as `img_size` and, of a Vim, `stride` (the position
            embedding is resized to them), `in_chans` (the first convolution is adapted: the sum of its channels for 1,
            else these repeated and scaled), or `class_token="head"`, `bidirectional="layer"` and `scan="cascade"`,
            which leave no trace in the tensors; and timm's `features_only`, `out_indices` and `feature_cls`, which may
            be "pyramid" for a Vim or ARM: see `SimplePyramid`, whose own layers start fresh.

    Returns:
        The encoder, in training mode, with a `LoadReport` as its `load_report`; how images are prepared for it,
        `timm.data.resolve_model_data_config` tells. With `features_only` timm's wrapper, which gives maps of features.

    Raises:
        ValueError: If the file cannot be read, is not what was written, holds another encoder than asked for, leaves
            part of the encoder unfilled, or fills it with NaN or infinite values.
    """
    wrapping = {key: encoder_args.pop(key) for key in _OF_THE_WRAPPER if key in encoder_args}
    file = read_checkpoint(path, ema)
    if file.name is not None:
        check_described_encoder(file.name, file.args, file.state, file.path)
    file, name, args = name_and_args(file, name, encoder_args)
    classifier = file.state.get(f"{_classifier(name)}.weight")
    classes_in_file = 0 if classifier is None else classifier.shape[0]
    args["num_classes"] = classes_in_file if num_classes is None else num_classes
    model = _sized_as_filled(name, args, file)
    other_head: set[str] = set()
    if args["num_classes"] != classes_in_file:
        other_head = _head_names(model, name, args) | _pooled_norm(model, file)
    report = fill(model, file, name, other_head, keep_dtypes, encoder_args)
    report = _resized_after(model, args, report)
    if wrapping.get("features_only"):
        args |= wrapping
        model = _wrapped(model, name, args, keep_dtypes)
    remember_images(model, file.images)
    notes = [*report.notes, *_about_head(args["num_classes"], classes_in_file), *["sha256 verified"] * file.verified]
    report = replace(report, args=args, notes=tuple(notes))
    model.load_report = report  # type: ignore[assignment]
    _logger.info("%s", report)
    return model


def _sized_as_filled(name: str, args: dict[str, Any], file: CheckpointFile) -> nn.Module:
    """The encoder, for the image size of its file if it is timm's and can change that later; ours resize in filling."""
    if file.name is not None and "img_size" in args:
        model = create_encoder(name, **{**args, "img_size": file.args.get("img_size")})
        if hasattr(model, "set_input_size") and not isinstance(model, SequenceEncoder):
            return model
    return create_encoder(name, **args)


def _resized_after(model: nn.Module, args: dict[str, Any], report: LoadReport) -> LoadReport:
    """Bring one of timm's encoders to the image size asked for, after it was filled."""
    if "img_size" not in args or isinstance(model, SequenceEncoder) or not hasattr(model, "set_input_size"):
        return report
    size = to_height_width(args["img_size"])
    if tuple(get_model_input_config(model)["input_size"][1:]) == size:
        return report
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    old = cast(Any, model).patch_embed.grid_size
    cast(Any, model).set_input_size(img_size=size)
    resized = tuple(key for key, tensor in model.state_dict().items() if tensor.shape != shapes[key])
    return replace(report, resized=resized, notes=(resized_note(old, cast(Any, model).patch_embed.grid_size),))


def _wrapped(model: nn.Module, name: str, args: dict[str, Any], keep_dtypes: bool) -> nn.Module:
    """The encoder's values in timm's wrapper, which renames modules: it puts "model." before, or "_" for ".".

    A pyramid's own layers stay fresh.
    """
    wrapper = create_encoder(name, **args)
    values = {key.replace("_", "."): tensor for key, tensor in model.state_dict().items()}
    assert len(values) == len(model.state_dict())
    fresh = {key: tensor for key, tensor in wrapper.state_dict().items() if key.startswith("levels.")}
    filled = wrapper.state_dict().keys() - fresh.keys()
    wanted = {key: values[key.removeprefix("model.").replace("_", ".")] for key in filled}
    wrapper.load_state_dict(wanted | fresh, assign=keep_dtypes)
    return wrapper


def _about_head(classes: int, classes_in_file: int) -> list[str]:
    """What a report says of a head that is not the file's."""
    if classes == classes_in_file:
        return []
    if not classes:
        return [f"head of {classes_in_file} classes left out"]
    return [
        f"fresh head of {classes} classes, the file has {f'one of {classes_in_file}' if classes_in_file else 'none'}"
    ]


def _classifier(name: str) -> str:
    """Name of the layer that gives the logits, the first where there are two."""
    config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    found = "head" if config is None else config.classifier
    return found[0] if isinstance(found, tuple) else found or "head"


def _head_names(model: nn.Module, name: str, args: dict[str, Any]) -> set[str]:
    """Names of the tensors that the encoder has with classes and lacks without, or the other way round."""
    with torch.device("meta"):
        counterpart = create_encoder(name, **{**args, "num_classes": 0 if args["num_classes"] else 1})
    return model.state_dict().keys() ^ counterpart.state_dict().keys()


def _pooled_norm(model: nn.Module, file: CheckpointFile) -> set[str]:
    """timm's norm of what is pooled, if the file's encoder pooled nothing: it begins with the head, as MAE's does."""
    return {name for name in model.state_dict() if name.startswith("fc_norm.") and name not in file.state}
