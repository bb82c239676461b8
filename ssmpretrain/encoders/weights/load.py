"""Encoders from checkpoint files: published weights, our own runs, exported files."""

import logging
from pathlib import Path
from typing import Any

from torch import nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.families import match_encoder
from ssmpretrain.encoders.weights.build import build_for
from ssmpretrain.encoders.weights.content import contents_of
from ssmpretrain.encoders.weights.fill import fill
from ssmpretrain.encoders.weights.finish import finish
from ssmpretrain.encoders.weights.on_disk import check_whole, files_of, weights_in
from ssmpretrain.encoders.weights.preprocessing import checked_images, remember_images
from ssmpretrain.encoders.weights.state_dict import (
    CheckpointFile,
    check_sha256,
    choose_state,
    encoder_metadata,
    origin_in,
    own_names,
)

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
    file = _read(path, ema)
    said = None if file.name is None else (file.name, file.args)
    match = match_encoder(file.path, file.state, said, name, encoder_args)
    built = build_for(match, file, num_classes, wrapping)
    filled = fill(match, built, file, keep_dtypes, encoder_args)
    model, report = finish(match, built, filled, file, keep_dtypes)
    remember_images(model, checked_images(file.images, file.path))
    model.load_report = report  # type: ignore[assignment]
    _logger.info("%s", report)
    return model


def _read(path: str | Path, ema: bool | None) -> CheckpointFile:
    """Read the encoder's weights from a file; arguments as in `load_encoder`.

    Raises:
        ValueError: If there is no such file, it is damaged, holds something else than weights, or lacks the weights
            asked for.
    """
    path = weights_in(path)
    files = files_of(path)
    check_whole(files)
    content, about = contents_of(path, files)
    if not isinstance(content, dict):
        raise UserError(
            f"checkpoint: a checkpoint is a dictionary of tensors; {path} holds a {type(content).__name__}."
        )
    entry, source = choose_state(content, path, ema)
    name, args = encoder_metadata(about.get("encoder"), path)
    state = own_names(entry, path)
    verified = check_sha256(entry, about.get("sha256"), path)
    origin = dict(about["origin"]) if isinstance(about.get("origin"), dict) else {}
    if "sha256" not in about:
        origin = origin_in(content, source, path)
    images = about.get("images") if name is not None else None
    return CheckpointFile(path, state, source, name, args, images, origin, verified)
