"""Encoders from checkpoint files: published weights, our own runs, exported files."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ssmpretrain.encoders.weights.build import build_for
from ssmpretrain.encoders.weights.fill import fill, fill_wrapper
from ssmpretrain.encoders.weights.match import match_encoder
from ssmpretrain.encoders.weights.preprocessing import checked_images, remember_images
from ssmpretrain.encoders.weights.reading import read_checkpoint

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
    file, name, args = match_encoder(file, name, encoder_args)
    built = build_for(file, name, args, num_classes, wrapping)
    report = fill(built, file, keep_dtypes, encoder_args)
    if built.wrapper is not None:
        report = replace(report, args=report.args | wrapping)
    model = built.model if built.wrapper is None else fill_wrapper(built, keep_dtypes)
    remember_images(model, checked_images(file.images, file.path))
    model.load_report = report  # type: ignore[assignment]
    _logger.info("%s", report)
    return model
