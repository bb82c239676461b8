"""Last steps of loading, after an encoder is filled: image size, timm's wrapper, and the report."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from timm.layers.helpers import to_2tuple
from timm.models import get_model_input_config
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.family_registry import Match
from ssmpretrain.encoders.layers.state_space import MOST_WIDTH
from ssmpretrain.encoders.weights.build import BuiltEncoder
from ssmpretrain.encoders.weights.fill import Filled, listed
from ssmpretrain.encoders.weights.finite_check import check_finite
from ssmpretrain.encoders.weights.provenance import summary
from ssmpretrain.encoders.weights.state_dict import CheckpointFile


@dataclass(frozen=True)
class LoadReport:
    """Report of `load_encoder`; `str()` gives the line that was logged.

    Attributes:
        path: Path of the file.
        source: Name of the entry of the file that was read, such as "model", "model_ema" or "teacher in state_dict".
        encoder: Registered name of the encoder.
        loaded: Number of the encoder's tensors that were filled from the file.
        total: Number of the encoder's tensors.
        resized: Names of the encoder's tensors that were resampled from another shape.
        fresh: Names of the encoder's tensors that keep their initial values: a new head, and the class token of an ARM
            encoder whose file has one direction.
        unexpected: Names of tensors in the file that the encoder does not have, including those of a removed head.
        copied: Names of the encoder's tensors that are copies of the forward direction.
        args: Arguments of `create_encoder`, besides the name, that build the same encoder with random weights.
        origin: Training that the weights come from, see `describe_weights`.
        notes: Further facts, one line each: the teacher taken by default, resized positions, a removed or new head,
            norms for dense tasks, other modules in the file of another program, a verified sha256.
    """

    path: Path
    source: str
    encoder: str
    loaded: int
    total: int
    resized: tuple[str, ...]
    fresh: tuple[str, ...]
    unexpected: tuple[str, ...]
    copied: tuple[str, ...] = ()
    args: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        training = summary(self.origin)
        counts = (
            f"{self.encoder} from {self.path} ({self.source}): {self.loaded} of {self.total} tensors loaded, "
            f"{f'{len(self.copied)} of them copied from the forward direction, ' if self.copied else ''}"
            f"{len(self.resized)} resized, missing {listed(self.fresh)}, unexpected {listed(self.unexpected)}"
        )
        return "; ".join([counts, *self.notes, *([training] if training else [])])


def finish(
    match: Match, built: BuiltEncoder, filled: Filled, file: CheckpointFile, keep_dtypes: bool
) -> tuple[nn.Module, LoadReport]:
    """Set the image size of a filled encoder, wrap it if the caller passed `features_only`, and write the report.

    Args:
        match: The encoder that was recognised in the file.
        built: The encoder.
        filled: Result of filling it.
        file: The content of the file.
        keep_dtypes: As in `load_encoder`.

    Returns:
        The encoder or its wrapper, and the report.

    Raises:
        ValueError: If the image size is invalid.
    """
    adapted = filled.adapted
    report = LoadReport(
        file.path, file.source, match.name, filled.loaded, len(built.model.state_dict()), adapted.resized,
        filled.fresh, filled.unexpected, adapted.copied, built.args, file.origin,
    )  # fmt: skip
    notes = adapted.notes
    if adapted.tap_norms:
        check_finite("load_encoder", _names(adapted.tap_norms), file.path)
        built.model.tap_norms = adapted.tap_norms  # type: ignore[assignment]
        notes += (f"norms of stages {', '.join(map(str, adapted.tap_norms))} kept for dense tasks",)
    if built.resize_to is not None and (resized := _resize(built.model, built.resize_to)):
        report = replace(report, resized=resized[0])
        notes = (resized[1],)
    head = _head_note(built.args["num_classes"], built.classes_in_file)
    others = [f"tensors not read: {file.others}"] if file.others else []
    report = replace(
        report, notes=(*[file.choice] * bool(file.choice), *notes, *head, *others, *["sha256 verified"] * file.verified)
    )
    return built.model if built.wrapper is None else _wrap(built.model, built.wrapper, keep_dtypes), report


def _names(tap_norms: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"norm {index} {name}": tensor for index, norm in tap_norms.items() for name, tensor in norm.items()}


def _resize(model: Any, img_size: Any) -> tuple[tuple[str, ...], str] | None:
    """Set the image size of an encoder of timm, in place.

    Returns:
        Names of the resized tensors, and a note for the report; None if the encoder already has this size.
    """
    size = to_2tuple(img_size)
    if not (len(size) == 2 and all(isinstance(side, int) and 0 < side <= MOST_WIDTH for side in size)):
        raise UserError(
            f"load_encoder: img_size is one number of pixels or (height, width), at most {MOST_WIDTH:,}; "
            f"got {img_size!r}."
        )
    if tuple(get_model_input_config(model)["input_size"][1:]) == tuple(size):
        return None
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    old = model.patch_embed.grid_size
    model.set_input_size(img_size=tuple(size))
    resized = tuple(key for key, tensor in model.state_dict().items() if tensor.shape != shapes[key])
    new = model.patch_embed.grid_size
    return resized, f"positions resized from {old[0]} x {old[1]} to {new[0]} x {new[1]} patches"


def _wrap(model: nn.Module, wrapper: nn.Module, keep_dtypes: bool) -> nn.Module:
    """Copy the tensors of an encoder into timm's wrapper of it. The layers of a pyramid keep their random values.

    The names in a wrapper start with "model.", or have "_" in the place of ".".
    """
    values = {key.replace("_", "."): tensor for key, tensor in model.state_dict().items()}
    assert len(values) == len(model.state_dict())
    own = wrapper.state_dict()
    fresh = {key: tensor for key, tensor in own.items() if key.startswith("levels.")}
    wanted = {key: values[key.removeprefix("model.").replace("_", ".")] for key in own.keys() - fresh.keys()}
    wrapper.load_state_dict(wanted | fresh, assign=keep_dtypes)
    return wrapper


def _head_note(classes: int, classes_in_file: int) -> list[str]:
    """Return a note for the report if the head of the encoder is not the head of the file; else nothing."""
    if classes == classes_in_file:
        return []
    if not classes:
        return [f"head of {classes_in_file} classes left out"]
    return [
        f"fresh head of {classes} classes, the file has {f'one of {classes_in_file}' if classes_in_file else 'none'}"
    ]
