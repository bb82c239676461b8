"""Weights of an encoder in a checkpoint file, whoever wrote it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ssmpretrain.encoders.weights.content import contents_of
from ssmpretrain.encoders.weights.on_disk import check_whole, files_of, weights_in
from ssmpretrain.encoders.weights.provenance import check_sha256, origin_in
from ssmpretrain.encoders.weights.state_dict import choose_state, encoder_metadata, own_names


@dataclass(frozen=True)
class CheckpointFile:
    """Weights of an encoder as a file holds them.

    Attributes:
        path: The file, or the folder of its parts.
        state: The tensors by the encoder's own names, wrappers' prefixes removed.
        source: The entry of the file that they come from, such as "model" or "model_ema".
        name: The encoder's registered name, when the file says so.
        args: The arguments it was built with, when the file says so.
        images: How images are prepared for it, when the file says so and unchecked; see `checked_images`.
        origin: The training that the weights come from; see `describe_weights`.
        verified: Whether the file gave the sha256 of its tensors, which then is theirs.
    """

    path: Path
    state: dict[str, Tensor]
    source: str
    name: str | None
    args: dict[str, Any]
    images: Any = None
    origin: dict[str, Any] = field(default_factory=dict)
    verified: bool = False


def read_checkpoint(path: str | Path, ema: bool | None = None) -> CheckpointFile:
    """Read the encoder's weights from a file.

    Args:
        path: A `.pth` of the published code ({"model": ...}, {"model_ema": ...} or the bare state dict), a checkpoint
            of ours or of timm's trainer, or a safetensors file; or the folder of a run or of timm's that holds one.
        ema: True for the exponential moving average, False for the weights that were trained; None for the entry that
            the file calls its model.

    Raises:
        ValueError: If there is no such file, it is damaged, holds something else than weights, or lacks the weights
            asked for.
    """
    path = weights_in(path)
    files = files_of(path)
    check_whole(files)
    content, about = contents_of(path, files)
    if not isinstance(content, dict):
        raise ValueError(
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


def read_content(path: str | Path) -> Any:
    """Read everything in a file of weights, tensors and plain data; no code is run; errors as `read_checkpoint`."""
    path = Path(path).expanduser()
    files = files_of(path)
    check_whole(files)
    return contents_of(path, files)[0]
