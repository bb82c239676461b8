"""Copy a file's tensors into an encoder, all of them or none, and say what was done."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from timm.models import adapt_input_conv
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.arm import checkpoint as recognise_arm
from ssmpretrain.encoders.arm.arm import ARMEncoder
from ssmpretrain.encoders.sequence.encoder import SequenceEncoder, to_height_width
from ssmpretrain.encoders.sequence.pos_embed import resize_pos_embed, square_side
from ssmpretrain.encoders.vim.vim import VARIANTS
from ssmpretrain.encoders.weights.finite import check_finite
from ssmpretrain.encoders.weights.provenance import summary
from ssmpretrain.encoders.weights.reading import CheckpointFile
from ssmpretrain.encoders.weights.variant import FINER_GRID

_MAX_LISTED = 5


@dataclass(frozen=True)
class LoadReport:
    """What a load did; `str()` is the line that was logged.

    Attributes:
        path: The file.
        source: The entry of the file that was taken, such as "model" or "model_ema".
        encoder: The encoder's name and sizes.
        loaded: Number of the encoder's tensors that the file filled.
        total: Number of the encoder's tensors.
        resized: Names of those whose values were resampled to another shape.
        fresh: Names of those left at their initial values: none, or the head's, and the class token that an ARM encoder
            pretrained in one direction lacks.
        unexpected: Names in the file that the encoder has no place for, a dropped head included.
        copied: Names of those that got a copy of the forward direction's values.
        args: Further arguments of `create_encoder` that give the same encoder with fresh weights.
        origin: Where the weights come from, see `describe_weights`.
        notes: What else was done, in words: what was resized from what to what, what became of the head, whether the
            file's sha256 was verified.
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
            f"{len(self.resized)} resized, missing {_listed(self.fresh)}, unexpected {_listed(self.unexpected)}"
        )
        return "; ".join([counts, *self.notes, *([training] if training else [])])


def fill(
    model: nn.Module, file: CheckpointFile, name: str, other_head: set[str], keep_dtypes: bool, asked: Mapping[str, Any]
) -> LoadReport:
    """Copy a file's tensors into an encoder.

    Args:
        model: The encoder.
        file: The file.
        name: The encoder's name.
        other_head: Names of tensors of the head that are not to be taken from the file.
        keep_dtypes: As in `load_encoder`.
        asked: The arguments that the caller asked for, for the message.

    Raises:
        ValueError: If anything but `other_head` stays unfilled, anything of the encoder's is left over, or a value is
            no finite number.
    """
    own = model.state_dict()
    fitted = _with_channels(_fitted_state(model, file), model, asked)
    usable = {key: tensor for key, tensor in fitted.state.items() if key in own and key not in other_head}

    may_lack = other_head | {"cls_token"} if fitted.copied else other_head  # one direction has no class token
    missing = [key for key in own if key not in usable and key not in may_lack]
    misfits = [key for key, tensor in usable.items() if _kind(tensor) != _kind(own[key])]
    parts = {key.split(".")[0] for key in own}
    unexpected = [key for key in fitted.state if key not in usable]
    left_over = [key for key in unexpected if key.split(".")[0] in parts and key not in other_head]
    kinds = [f"{key} is {_kind(usable[key])} in the file and {_kind(own[key])} in the encoder" for key in misfits]
    problems = {"missing": missing, "of another kind": kinds, "left over": left_over}
    if any(problems.values()):
        listed = "; ".join(f"{len(keys)} {what}: {_listed(keys)}" for what, keys in problems.items() if keys)
        raise UserError(
            f"load_encoder: {file.path} does not fill {name}; of {len(own)} tensors {listed}. "
            + _remedy(file, misfits, asked)
        )
    check_finite("load_encoder", usable, file.path)
    model.load_state_dict(usable, strict=False, assign=keep_dtypes)
    fresh = tuple(key for key in own if key not in usable)
    return LoadReport(
        file.path, file.source, name, len(usable), len(own), fitted.resized, fresh, tuple(unexpected), fitted.copied,
        origin=file.origin, notes=fitted.notes,
    )  # fmt: skip


def resized_note(old: tuple[int, int], new: tuple[int, int]) -> str:
    """What a report says of positions that were resized from one grid of patches to another."""
    return f"positions resized from {old[0]} x {old[1]} to {new[0]} x {new[1]} patches"


def _remedy(file: CheckpointFile, misfits: list[str], asked: Mapping[str, Any]) -> str:
    """What to do about tensors that do not fill an encoder."""
    if "patch_embed.proj.weight" in misfits and (side := file.state["patch_embed.proj.weight"].shape[-1]):
        return f"Its patches have {side} x {side} pixels: pass patch_size={side} or leave it out, or {FINER_GRID}."
    other = [key for key, value in asked.items() if file.name is not None and value != file.args.get(key)]
    if other:
        built = ", ".join(f"{key}={file.args[key]!r}" if key in file.args else f"{key} unsaid" for key in other)
        return (
            f"The file says it was built with {built}: leave {', '.join(other)} out, or check that the file is whole."
        )
    return "Check that the file is whole and that `name` and the encoder's arguments are those it was trained with."


@dataclass(frozen=True)
class _Fitted:
    """A file's tensors as an encoder takes them; what was resized and copied for that, and how to say it."""

    state: dict[str, Tensor]
    resized: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def _fitted_state(model: nn.Module, file: CheckpointFile) -> _Fitted:
    state = dict(file.state)
    copied: tuple[str, ...] = ()
    if isinstance(model, ARMEncoder) and model.directions == 4 and recognise_arm.has_one_direction(state):
        state, copied = recognise_arm.four_directions(state)
    if not isinstance(model, SequenceEncoder) or "pos_embed" not in state:
        return _Fitted(state, copied=copied)
    wanted = model.patch_embed.grid_size
    grid = _grid_in(file, state["pos_embed"], model)
    if grid in (None, wanted):
        return _Fitted(state, copied=copied)
    state["pos_embed"] = resize_pos_embed(state["pos_embed"], grid, wanted, model.class_token)
    return _Fitted(state, ("pos_embed",), copied, (resized_note(grid, wanted),))


def _with_channels(fitted: _Fitted, model: nn.Module, asked: Mapping[str, Any]) -> _Fitted:
    """The tensors with those that read the images brought to the channels asked for, as timm does it."""
    if "in_chans" not in asked:
        return fitted
    cfg, own = cast("dict[str, Any]", model.pretrained_cfg), model.state_dict()
    first = cfg.get("first_conv") or ()
    names = [f"{name}.weight" for name in ((first,) if isinstance(first, str) else first)]
    state, notes = dict(fitted.state), []
    for name in names:
        before, after = (weights[name].shape[1] if name in weights else None for weights in (state, own))
        if before is None or after is None or before == after or state[name].shape[2:] != own[name].shape[2:]:
            continue
        state[name] = adapt_input_conv(after, state[name], base_chans=before)
        notes.append(f"{name} adapted from {before} to {after} channels")
    return replace(fitted, state=state, notes=(*fitted.notes, *notes))


def _grid_in(file: CheckpointFile, table: Tensor, model: SequenceEncoder) -> tuple[int, int] | None:
    """The grid of patches that a file's position embedding was made for; None where that cannot be told."""
    wanted, patch = model.patch_embed.grid_size, model.patch_embed.patch_size
    if table.ndim != 3:
        return None  # its shape will be reported as wrong
    if file.name is not None:
        stride = file.args.get("stride") or VARIANTS.get(file.name, {}).get("stride", patch)
        height, width = to_height_width(file.args.get("img_size", 224))
        grid = ((height - patch) // stride + 1, (width - patch) // stride + 1)
    else:
        side = square_side(table, model.class_token)
        grid = wanted if side is None or side * side == math.prod(wanted) else (side, side)
    return grid if math.prod(grid) + model.num_class_tokens == table.shape[1] else None


def _kind(tensor: Tensor) -> str:
    """Shape of a tensor, and its dtype if it holds no fractions."""
    shape = str(tuple(tensor.shape))
    return shape if tensor.is_floating_point() else f"{shape} of {str(tensor.dtype).removeprefix('torch.')}"


def _listed(keys: Sequence[str]) -> str:
    """A handful of names and how many more there are; "none" for none."""
    more = f" and {len(keys) - _MAX_LISTED} more" if len(keys) > _MAX_LISTED else ""
    return ", ".join(keys[:_MAX_LISTED]) + more if keys else "none"
