"""Load encoders from checkpoint files: published weights, runs of this package, exported files."""

import logging
from pathlib import Path
from typing import Any

from torch import nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.family_registry import match_encoder
from ssmpretrain.encoders.weights.build import build_for
from ssmpretrain.encoders.weights.content import contents_of
from ssmpretrain.encoders.weights.fill import fill
from ssmpretrain.encoders.weights.finish import finish
from ssmpretrain.encoders.weights.on_disk import check_whole, files_of, weights_in
from ssmpretrain.encoders.weights.preprocessing import checked_images, remember_images
from ssmpretrain.encoders.weights.state_dict import (
    CheckpointFile,
    check_sha256,
    choose_encoder,
    encoder_metadata,
    origin_in,
    other_modules,
    own_names,
)

_logger = logging.getLogger(__name__)

# Arguments of timm's wrapper for features.
_OF_THE_WRAPPER = ("features_only", "out_indices", "feature_cls")


def load_encoder(
    path: str | Path,
    name: str | None = None,
    num_classes: int | None = None,
    *,
    ema: bool | None = None,
    teacher: bool | None = None,
    keep_dtypes: bool = False,
    **encoder_args: Any,
) -> nn.Module:
    """Build the encoder of a checkpoint and fill it with the weights in the file.

    The function reads the published `.pth` files of Vim, VMamba and ARM, also those of VMamba's segmentation and
    detection, checkpoints of DINO, iBOT and code based on them, training checkpoints of this package, and all files
    that `save_encoder` writes. Code in a file is never run.

    If the file does not fill the encoder, the function raises an error. Only these tensors may keep random values: a
    new head, the norm of pooled features before it, the class token of ARM, and the final norm of VMamba if the file
    comes from the published code for dense tasks. Such a file has a norm for each stage instead, which `TappedEncoder`
    reads. Heads and necks in it are not read; the report names them.

    An ARM encoder has four directions, as for fine-tuning. If the file has one direction, as after pretraining, the
    other directions are copies of it, and the class token is random. `directions=1` gives the pretrained encoder.

    Args:
        path: Path of the file. The folder of a run also works (for its last checkpoint), and so does a folder that
            `save_encoder` wrote in the format "timm".
        name: Registered name of the encoder; None recognises the encoder from the metadata of the file, or from the
            names and shapes of its tensors.
        num_classes: None keeps the head of the file; if the file has no head, the encoder returns pooled features. 0
            removes the head. Another number keeps the head of the file if it has so many classes, and otherwise makes a
            new head with random weights.
        ema: True loads the moving average of the weights, False the trained weights. None loads the entry that the file
            calls its model.
        teacher: True loads the teacher of a run of DINO or iBOT, of this package or of the official code, False the
            student. None loads the teacher if the file has one; the report says so.
        keep_dtypes: Keep the dtypes of the file, such as float16, to write the weights again unchanged. False converts
            them to float32, for training and inference.
        encoder_args: Further arguments of the encoder. `img_size`, and `stride` of Vim, resize the position embedding.
            `in_chans` adapts the first convolution: its channels are summed for 1, and repeated and scaled for other
            numbers. Arguments that cannot be seen in the tensors can be passed too, such as `class_token="head"`,
            `bidirectional="layer"` and `scan="cascade"`. `features_only`, `out_indices` and `feature_cls` work as in
            timm; for Vim and ARM, `feature_cls` may be "pyramid", see `SimplePyramid`, whose layers start random.

    Returns:
        The encoder, in training mode. Its attribute `load_report` is a `LoadReport`. The preprocessing of its images is
        given by `timm.data.resolve_model_data_config`. With `features_only`, the result is timm's wrapper, which
        returns feature maps.

    Raises:
        ValueError: If the file cannot be read, differs from its checksum, holds another encoder than `name`, does not
            fill the whole encoder, or has NaN or infinite values.
    """
    wrapping = {key: encoder_args.pop(key) for key in _OF_THE_WRAPPER if key in encoder_args}
    file = _read(path, ema, teacher)
    said = None if file.name is None else (file.name, file.args)
    match = match_encoder(file.path, file.state, said, name, encoder_args)
    built = build_for(match, file, num_classes, wrapping)
    filled = fill(match, built, file, keep_dtypes, encoder_args)
    model, report = finish(match, built, filled, file, keep_dtypes)
    remember_images(model, checked_images(file.images, file.path))
    model.load_report = report  # type: ignore[assignment]
    _logger.info("%s", report)
    return model


def encoder_name_in(path: str | Path) -> str:
    """Return the registered name of the encoder in a file that `load_encoder` reads, without building it.

    Raises:
        ValueError: If the file cannot be read, or if its encoder is not recognised.
    """
    file = _read(path, ema=None, teacher=None)
    said = None if file.name is None else (file.name, file.args)
    return match_encoder(file.path, file.state, said, None, {}).name


def _read(path: str | Path, ema: bool | None, teacher: bool | None) -> CheckpointFile:
    """Read the weights of the encoder from a file. The arguments are those of `load_encoder`.

    Raises:
        ValueError: If the file does not exist, is damaged, holds no weights, or does not have the weights that `ema`
            and `teacher` select.
    """
    if not isinstance(path, str | Path):
        raise UserError(f"load_encoder: path is that of a file or folder; got {path!r}. Give a path.")
    if "://" in str(path):
        raise UserError(f"load_encoder: path is that of a file on this machine; got {path}. Download it first.")
    path = weights_in(path)
    files = files_of(path)
    check_whole(files)
    content, about = contents_of(path, files)
    if not isinstance(content, dict):
        raise UserError(
            f"checkpoint: a checkpoint is a dictionary of tensors; {path} holds a {type(content).__name__}."
        )
    entry, source, choice = choose_encoder(content, path, ema, teacher)
    name, args = encoder_metadata(about.get("encoder"), path)
    state = own_names(entry, path)
    verified = check_sha256(entry, about.get("sha256"), path)
    origin = dict(about["origin"]) if isinstance(about.get("origin"), dict) else {}
    if "sha256" not in about:
        origin = origin_in(content, source, path)
    images = about.get("images") if name is not None else None
    others = other_modules(entry) if name is None else ""
    return CheckpointFile(path, state, source, name, args, images, others, choice, origin, verified)
